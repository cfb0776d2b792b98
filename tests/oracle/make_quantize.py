"""Makes tests/data/quantize: small networks in ONNX that tests quantise.

    python tests/oracle/make_quantize.py     # needs torch, onnx

All take 32×32 pixels and tell five classes. `mixed` has every operator that goes with whole numbers, and some that do not;
`rescaled` computes the same as `plain`, but one channel between two of its layers is ten thousand times as large.
"""

import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional as F

OUT = Path(__file__).parents[1] / "data" / "quantize"
FACTOR = 10_000
warnings.filterwarnings("ignore")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return self.head(x.mean((2, 3)) if self.training else F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixed(nn.Module):
    """Residuals, groups, gates, poolings, a row of parts, a cut-off activation, a linear layer without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 8, 1)
        self.smooth = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.signed = nn.Conv2d(16, 12, 1)
        self.gate = nn.Conv2d(12, 12, 1)
        self.inner = nn.Linear(12, 10, bias=False)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(x + self.wide(F.relu6(self.narrow(x))))
        x = torch.cat([F.max_pool2d(x, 2), F.silu(self.smooth(x))], 1)
        x = self.signed(x)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.gelu(self.inner(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Padded(Plain):
    """A border that lies outside of what it surrounds."""

    def forward(self, x):
        x = F.pad(F.relu(self.first(x)), (1, 1, 1, 1), value=-2.0)
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ConvHead(Plain):
    """A convolution gives a map of each class, whose mean is its logit."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return F.adaptive_avg_pool2d(self.head(x), 1).flatten(1)


def lively(model, seed, gain=1.6):
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            fan = part.weight[0].numel()
            part.weight.data = torch.randn(part.weight.shape, generator=generator) * gain / fan ** 0.5
            if part.bias is not None:
                part.bias.data = torch.randn(part.bias.shape, generator=generator) * 0.2
    return model.eval()


def export(model, name, opset=17):
    torch.onnx.export(
        model, (torch.zeros(1, 3, 32, 32),), OUT / f"{name}.onnx", dynamo=False, opset_version=opset, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )
    file = onnx.load(OUT / f"{name}.onnx")
    for node in file.graph.node:
        node.doc_string = ""
    onnx.save(file, OUT / f"{name}.onnx")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    plain = lively(Plain(), 1)
    export(plain, "plain")
    export(plain, "old_opset", opset=11)
    with torch.no_grad():
        plain.second.weight[0] *= FACTOR
        plain.second.bias[0] *= FACTOR
        plain.third.weight[:, 0] /= FACTOR
    export(plain, "rescaled")
    export(lively(Mixed(), 2), "mixed")
    export(lively(Padded(), 4), "padded")
    export(lively(ConvHead(), 5), "conv_head")
    constant = lively(Plain(), 3)
    with torch.no_grad():
        constant.third.weight.zero_()
        constant.third.bias.fill_(0.5)
    export(constant, "constant")


if __name__ == "__main__":
    main()
