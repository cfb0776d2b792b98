"""Exports networks of many families with both of PyTorch's exporters, folds each with the release `nbn-fold`, and compares
the bundle with PyTorch. Then each is calibrated on random pictures, scores them, and is served: the logits of `nbn score` are
compared with PyTorch's on the pixels of Pillow, and the server's answer with the row of `nbn score`.

    cargo build --release && python tests/oracle/onnx_networks.py [NAME…]
    # needs torch, torchvision, timm, transformers, onnxscript, pillow

PyTorch's newer exporter evaluates NBN itself when it optimises, so that nothing of it is left to find: networks with NBN
are exported without. Prints a table: nodes before and after, BatchNorms merged and left, NBN layers put in and found, the largest difference
from PyTorch in standard deviations of the logits. Fails when one exceeds 1e-4, or NBN layers are not all found.
"""

import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

PROGRAMS = Path(__file__).parents[2] / "target" / "release"
FOLD, NBN = PROGRAMS / "nbn-fold", PROGRAMS / "nbn"
PICTURES = 48
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
    # A random network is sure of nothing or of everything, and there is nothing to calibrate then.
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        spread = model(torch.randn(2, 3, side, side)).std(1).mean()
        head.weight *= 2 / spread
        head.bias *= 2 / spread
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
    bundle = folder / f"{path.stem}-models" / path.stem / "1"
    began = time.time()
    (folder / "classes.csv").write_text("label,count\n" + "".join(f"class {k},{1000 // (k + 1)}\n" for k in range(K)))
    command = [FOLD, "export", path, "--classes", folder / "classes.csv", "--out", bundle]
    flags = ["--resize", "both", "--resize-to", str(side), "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
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
    scored = end_to_end(model, side, bundle, folder / f"{path.stem}-pictures")
    good = good and scored < 1e-4
    outputs = [output["output"] for output in report["proof"]["outputs"]]
    print(
        f"{label} nodes {report['onnx']['nodes_before']:>5} → {report['onnx']['nodes_after']:<5} "
        f"BN merged {report['batch_norms_merged']:>3} left {left:>3}  NBN {nbn} of {count}  "
        f"PyTorch {difference:.1e}  scored {scored:.1e}  proof {report['proof']['outputs'][0]['max_relative']:.1e}  "
        f"{'features ' if 'features' in outputs else ''}{'one by one ' if one_by_one else ''}"
        f"{seconds:.1f} s  {'' if good else 'FAILED'}",
        flush=True,
    )
    return good


@torch.no_grad()
def end_to_end(model, side, bundle, photos):
    """Calibrates, scores and serves; gives the largest difference of a logit from PyTorch, in standard deviations."""
    random = np.random.default_rng(7)
    images = []
    for _ in range(PICTURES):
        small = random.integers(0, 256, (random.integers(3, 9), random.integers(3, 9), 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize((random.integers(40, 300), random.integers(40, 300)), Image.BICUBIC))
    inputs = np.stack([np.asarray(image.resize((side, side), Image.BILINEAR), np.float32) for image in images])
    inputs = (torch.from_numpy(inputs).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    expected = torch.cat([model(part) for part in inputs.split(8)]).numpy()
    # The network is right three times in four, else its second guess is.
    ranked = expected.argsort(1)[:, ::-1]
    labels = np.where(np.arange(PICTURES) % 4 == 3, ranked[:, 1], ranked[:, 0])
    for n, (image, label) in enumerate(zip(images, labels)):
        folder = photos / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{n:03}.png")

    def ask(*command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ask(FOLD, "calibrate", bundle, "--data", photos)
    rows = [json.loads(row) for row in ask(NBN, "score", "--model", bundle, "--logits", photos).splitlines()]
    assert len(rows) == PICTURES
    found = np.array([row["logits"] for row in sorted(rows, key=lambda row: Path(row["path"]).name)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        [NBN, "serve", "--models", bundle.parent.parent, "--default-model", bundle.parent.name, "--addr", address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        while subprocess.run([NBN, "health", "--addr", address], capture_output=True).returncode:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
        row = rows[0]
        body = (Path(row["path"])).read_bytes()
        url = f"http://{address}/v1/models/{bundle.parent.name}/classify"
        request = urllib.request.Request(url, body, {"content-type": "image/png"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
            answer = json.load(reply)
        told, best = answer["results"][0]["predictions"][0], row["predictions"][0]
        assert told["label"] == best["label"] and abs(told["score"] - best["score"]) < 1e-4, (told, best)
    finally:
        server.terminate()
        server.wait()
    return np.abs(found - expected).max() / expected.std()


def main():
    wanted = sys.argv[1:] or list(NETWORKS)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            for dynamo in (False, True):
                try:
                    failed += not check(name, dynamo, Path(folder))
                except Exception as error:
                    print(f"{name:<20} {'dynamo' if dynamo else 'script'} FAILED in PyTorch: {str(error)[-600:]}", flush=True)
                    failed += 1
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
