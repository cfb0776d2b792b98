"""The networks whose checkpoints `nbn fold export` reads, in PyTorch, with random but lively parameters."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pytorch"))
from nbn import CifarResNet, LogitRectification, NormalizedBatchNorm2d  # noqa: E402


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride, groups, inner_norm, last_norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = inner_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = inner_norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = last_norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), last_norm(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ImageNetResNet(nn.Module):
    """ResNet or ResNeXt with bottlenecks; with `experts`, stages 3 and 4 and the classifier exist once an expert.

    groups, group_width: of stage 1's 3x3 convolutions, doubling with each stage. norm: "bn" or "nbn".
    """

    def __init__(self, blocks=(3, 4, 6, 3), planes=(64, 128, 256, 512), groups=1, group_width=64,
                 classes=1000, norm="bn", head="linear", experts=None):
        super().__init__()
        stem = planes[0]
        self.experts = experts
        if norm == "nbn":
            self.scale_factor = nn.Parameter(torch.ones(20 if experts is None else 111))
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)

        def stage(inputs, index, expert):
            width = int(planes[index] * group_width / 64) * groups if groups > 1 else planes[index]
            last = norm == "nbn" and index == 3
            normalised = lambda c: NormalizedBatchNorm2d(c, self.scale_factor, expert or 0)  # noqa: E731
            last_norm = normalised if last else nn.BatchNorm2d
            inner_norm = normalised if last and expert is not None else nn.BatchNorm2d
            layers = []
            for block in range(blocks[index]):
                stride = 2 if index > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, width, planes[index] * 4, stride, groups, inner_norm, last_norm))
                inputs = planes[index] * 4
            return nn.Sequential(*layers)

        def classifier(features):
            if head == "linear":
                return nn.Linear(features, classes)
            return LogitRectification(features, classes, affine=head == "lr")

        self.layer1 = stage(stem, 0, None)
        self.layer2 = stage(planes[0] * 4, 1, None)
        if experts is None:
            self.layer3 = stage(planes[1] * 4, 2, None)
            self.layer4 = stage(planes[2] * 4, 3, None)
            self.fc = classifier(planes[3] * 4)
        else:
            self.layer3s = nn.ModuleList(stage(planes[1] * 4, 2, e) for e in range(experts))
            self.layer4s = nn.ModuleList(stage(planes[2] * 4, 3, e) for e in range(experts))
            self.linears = nn.ModuleList(classifier(planes[3] * 4) for _ in range(experts))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer2(self.layer1(x))
        if self.experts is None:
            return self.fc(self.layer4(self.layer3(x)).mean((2, 3)))
        logits = [
            linear(four(three(x)).mean((2, 3)))
            for three, four, linear in zip(self.layer3s, self.layer4s, self.linears)
        ]
        return torch.stack(logits).mean(0)


@torch.no_grad()
def enliven(model, seed, tiny_variances=False):
    """Random weights and statistics such as a long training leaves, and calibrated so that activations stay in range."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda t, low, high: t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)  # noqa: E731
    normal = lambda t, std: t.copy_(torch.randn(t.shape, generator=generator) * std)  # noqa: E731
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            normal(module.running_mean, 0.3)
            uniform(module.running_var, 0.4, 2.0)
            if module.affine:
                uniform(module.weight, 0.3, 1.2)
                normal(module.bias, 0.3)
            if tiny_variances and module.affine:
                # Channels that hardly vary, beside the BatchNorm's epsilon of 1e-5; their weights are as small.
                module.running_var[::3] = 1e-3 * torch.rand(module.running_var[::3].shape, generator=generator)
                module.running_mean[::3] *= 0.02
                module.weight[::3] *= 0.02
        elif isinstance(module, (nn.Linear, LogitRectification)):
            normal(module.weight, 0.1)
            normal(module.bias, 0.5)
    if hasattr(model, "scale_factor"):
        # Only the first elements act; the rest has decayed.
        model.scale_factor.fill_(4e-5)
        acting = getattr(model, "experts", None) or 1
        uniform(model.scale_factor[:acting], 8, 14)
    return model.eval()


def save(model, arch, path, prefix=""):
    """A checkpoint in the form of the authors' training code."""
    state = {prefix + key: value for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.save({
        "epoch": 180, "arch": arch, "state_dict": state, "best_acc1": torch.tensor(47.5),
        "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 180, "_last_lr": [0.0]},
    }, path)


LAYOUTS = {
    # name: (arch, arguments)
    "resnet50": ("resnet50", {}),
    "resnext50": ("resnext50", {"groups": 32, "group_width": 4}),
    "resnet50_nbn": ("resnet50_nbn", {"norm": "nbn"}),
    "resnet50_nbn_lr": ("resnet50_nbn", {"norm": "nbn", "head": "lr"}),
    "resnet50_nbn_lr_plain": ("resnet50_nbn", {"norm": "nbn", "head": "lr-plain"}),
    "resnext50_nbn": ("resnext50_nbn", {"norm": "nbn", "groups": 32, "group_width": 4}),
    "ride_nbn": ("resnet50_ride_NBN", {"norm": "nbn", "experts": 3}),
    "ride_nbn_lr_plain": ("resnet50_ride_NBN", {"norm": "nbn", "experts": 3, "head": "lr-plain"}),
    "ride": ("resnet50_ride", {"experts": 3}),
}


def full_size(name):
    arch, arguments = LAYOUTS[name]
    planes = (64, 128, 192, 384) if "experts" in arguments else (64, 128, 256, 512)
    return arch, ImageNetResNet(planes=planes, **arguments)


def small(name):
    """The same layout, narrow and shallow; the last stage keeps two blocks."""
    arch, arguments = LAYOUTS[name]
    arguments = dict(arguments)
    if "groups" in arguments:
        arguments |= {"groups": 2, "group_width": 32}
    return arch, ImageNetResNet(blocks=(1, 1, 1, 2), planes=(2, 4, 8, 16), classes=7, **arguments)


def cifar(option, norm="nbn", head="lr-plain"):
    return f"resnet14_{norm}", CifarResNet(14, 6, norm, head, option, width=4)
