"""Exports networks of many families with both of PyTorch's exporters, folds each with the release `nbn-fold`, and compares
the bundle with PyTorch.

    cargo build --release && python tests/oracle/onnx_networks.py [NAME…]     # needs torch, torchvision, timm, onnxscript

PyTorch's newer exporter evaluates NBN itself when it optimises, so that nothing of it is left to find: networks with NBN
are exported without. Prints a table: nodes before and after, BatchNorms merged and left, NBN layers put in and found, the largest difference
from PyTorch in standard deviations of the logits. Fails when one exceeds 1e-4, or NBN layers are not all found.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

FOLD = Path(__file__).parents[2] / "target" / "release" / "nbn-fold"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Nbn(nn.BatchNorm2d):
    """A BatchNorm whose weight and bias are unit directions times one magnitude (arXiv 2501.03122)."""

    def forward(self, x):
        weight = self.alpha * self.weight / (self.weight.norm(2) + 1e-6)
        bias = self.alpha * self.bias / (self.bias.norm(2) + 1e-6)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


class Tower(nn.Module):
    """CLIP's image tower with a linear head."""

    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=224,
            patch_size=32, projection_dim=128, attn_implementation="eager",
        )
        self.tower = CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(128, 20)

    def forward(self, x):
        return self.head(F.normalize(self.tower(pixel_values=x).image_embeds, dim=-1))


K = 20
NETWORKS = {
    # Name: how it is made, its input's side, whether its BatchNorms become NBN.
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=K), 96, True),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=K), 96, False),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=K), 96, True),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(num_classes=K), 96, True),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=K), 64, True),
    "vgg16_bn": (lambda: torchvision.models.vgg16_bn(num_classes=K), 224, False),
    "inception_v3": (lambda: torchvision.models.inception_v3(num_classes=K, aux_logits=False, init_weights=False), 139, True),
    "convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=K), 96, False),
    "vit_small": (lambda: timm.create_model("vit_small_patch32_224", num_classes=K), 224, False),
    "swin_tiny": (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=K), 224, False),
    "clip": (Tower, 224, False),
    "resnet50d": (lambda: timm.create_model("resnet50d", num_classes=K), 96, True),
}


def make(name):
    build, side, nbn = NETWORKS[name]
    torch.manual_seed(len(name))
    model = build().eval()
    count = 0
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for n, module in enumerate(norms):
        nn.init.normal_(module.running_mean, 0, 0.1)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, 0, 0.1)
        if nbn and n >= len(norms) - 6 and type(module).forward is nn.BatchNorm2d.forward:
            module.__class__ = Nbn
            module.register_parameter("alpha", nn.Parameter(module.weight.norm(2).detach().clone()))
            count += 1
    return model, side, count


@torch.no_grad()
def check(name, dynamo, folder):
    model, side, count = make(name)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    path = folder / f"{name}-{'dynamo' if dynamo else 'script'}.onnx"
    if dynamo:
        torch.onnx.export(model, (x[:1],), path, dynamo=True, verbose=False, optimize=count == 0)
    else:
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        torch.onnx.export(
            model, (x,), path, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes=axes
        )
    bundle = folder / path.stem / "1"
    began = time.time()
    done = subprocess.run([FOLD, "export", path, "--out", bundle], capture_output=True, text=True)
    seconds = time.time() - began
    label = f"{name:<20} {'dynamo' if dynamo else 'script'}"
    if done.returncode:
        print(f"{label} FAILED {done.stderr.strip()[-600:]}", flush=True)
        return False
    report = json.loads((bundle / "manifest.json").read_text())["fold"]
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    one_by_one = report["onnx"].get("one_by_one", False)
    found = np.concatenate([session.run(["logits"], {"images": part.numpy()})[0] for part in (x[:1], x[1:])])
    if not one_by_one:
        together = session.run(["logits"], {"images": x.numpy()})[0]
        assert np.abs(together - found).max() < 1e-3, name
    difference = np.abs(found - expected.numpy()).max() / expected.std().item()
    nbn, left = len(report["normalized_layers"]), len(report.get("batch_norms_left", []))
    good = difference < 1e-4 and nbn == count
    outputs = [output["output"] for output in report["proof"]["outputs"]]
    print(
        f"{label} nodes {report['onnx']['nodes_before']:>5} → {report['onnx']['nodes_after']:<5} "
        f"BN merged {report['batch_norms_merged']:>3} left {left:>3}  NBN {nbn} of {count}  "
        f"PyTorch {difference:.1e}  proof {report['proof']['outputs'][0]['max_relative']:.1e}  "
        f"{'features ' if 'features' in outputs else ''}{'one by one ' if one_by_one else ''}"
        f"{seconds:.1f} s  {'' if good else 'FAILED'}",
        flush=True,
    )
    return good


def main():
    wanted = sys.argv[1:] or list(NETWORKS)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            for dynamo in (False, True):
                try:
                    failed += not check(name, dynamo, Path(folder))
                except Exception as error:
                    print(f"{name:<20} {'dynamo' if dynamo else 'script'} FAILED in PyTorch: {str(error)[:300]}", flush=True)
                    failed += 1
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
