"""Makes tests/data/training/: what PyTorch and Pillow compute, for tests/it/training.rs.

    python make_training.py            # needs torch, safetensors, numpy, pillow

gradients.safetensors   an NBN layer, the LR head and each loss: inputs, outputs and gradients by autograd
trajectory-*.safetensors a CIFAR ResNet of examples/pytorch: its start, 20 batches, the 20 losses, its end
colours.safetensors     a picture, and what Pillow makes of it by each operation of AutoAugment
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/pytorch"))
from nbn import CifarResNet, LogitRectification, NormalizedBatchNorm2d  # noqa: E402

OUT = ROOT / "tests/data/training"
COUNTS = torch.tensor([500.0, 200.0, 80.0, 20.0, 5.0])


def gradients():
    torch.manual_seed(1)
    tensors = {}

    def keep(name, **values):
        tensors.update({f"{name}.{key}": value.detach().clone().contiguous() for key, value in values.items()})

    alpha = torch.nn.Parameter(torch.tensor([1.7, 0.3]))
    layer = NormalizedBatchNorm2d(6, alpha)
    layer.weight.data = torch.randn(6)
    layer.bias.data = torch.randn(6)
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    r = torch.randn(4, 6, 5, 5)
    y = layer(x)
    (y * r).sum().backward()
    keep("nbn", x=x, r=r, weight=layer.weight, bias=layer.bias, alpha=alpha[:1], y=y, x_grad=x.grad,
         weight_grad=layer.weight.grad, bias_grad=layer.bias.grad, alpha_grad=alpha.grad[:1])

    head = LogitRectification(6, 5, affine=True)
    head.bias.data = torch.randn(5)
    head.bn.weight.data = torch.randn(5)
    head.bn.bias.data = torch.randn(5)
    x = torch.randn(16, 6, requires_grad=True)
    r = torch.randn(16, 5)
    y = head(x)
    (y * r).sum().backward()
    keep("lr", x=x, r=r, weight=head.weight, bias=head.bias, bn_weight=head.bn.weight, bn_bias=head.bn.bias, y=y,
         x_grad=x.grad, weight_grad=head.weight.grad, bn_weight_grad=head.bn.weight.grad, bn_bias_grad=head.bn.bias.grad,
         running_var=head.bn.running_var)

    labels = torch.arange(16) % 5
    logits = 3 * torch.randn(16, 5)
    prior = COUNTS / COUNTS.sum()

    def ldam(z):
        margins = COUNTS ** -0.25
        margins = margins * (0.5 / margins.max())
        effective = (1 - 0.9999) / (1 - 0.9999**COUNTS)
        weight = effective / effective.sum() * len(COUNTS)
        shifted = z - F.one_hot(labels, 5) * margins[labels][:, None]
        return F.cross_entropy(30 * shifted, labels, weight=weight)

    losses = {
        "cross-entropy": lambda z: F.cross_entropy(z, labels),
        "smoothed": lambda z: F.cross_entropy(z, labels, label_smoothing=0.1),
        "balanced-softmax": lambda z: F.cross_entropy(z + COUNTS.log(), labels),
        "logit-adjustment": lambda z: F.cross_entropy(z + 1.5 * prior.log(), labels),
        "ldam": ldam,
    }
    tensors["logits"], tensors["labels"] = logits, labels.float()
    for name, loss in losses.items():
        z = logits.clone().requires_grad_()
        value = loss(z)
        value.backward()
        keep(name, loss=value[None], grad=z.grad)
    save_file(tensors, OUT / "gradients.safetensors")


def trajectory(name, head, option):
    torch.manual_seed(2)
    model = CifarResNet(8, 5, "nbn", head, option, width=4)
    images, labels = torch.randn(20, 8, 3, 12, 12), torch.randint(0, 5, (20, 8))
    tensors = {f"start/{k}": v.clone() for k, v in model.state_dict().items()}
    tensors.update(images=images, labels=labels.float())
    named = list(model.named_parameters())
    decayed = {f"{n}.{p}" for n, m in model.named_modules() for p in ("weight", "bias")
               if isinstance(m, (torch.nn.Conv2d, LogitRectification))}
    optimizer = torch.optim.SGD(
        [{"params": [p for n, p in named if n in decayed], "weight_decay": 5e-3},
         {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0}],
        lr=0.05, momentum=0.9, nesterov=True,
    )
    losses = []
    for x, y in zip(images, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors["losses"] = torch.tensor(losses)
    tensors.update({f"end/{k}": v.clone() for k, v in model.state_dict().items()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, OUT / f"trajectory-{name}.safetensors")


def colours():
    generator = np.random.default_rng(3)
    small = generator.integers(30, 200, (6, 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((24, 20), Image.BILINEAR))
    picture = np.clip(picture.astype(int) + generator.integers(-9, 10, picture.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(picture)
    grey = (128, 128, 128)

    def affine(matrix):
        return image.transform(image.size, Image.AFFINE, matrix, Image.NEAREST, fillcolor=grey)

    made = {
        "shear-x": affine((1, 0.3, 0, 0, 1, 0)),
        "shear-y": affine((1, 0, 0, -0.2, 1, 0)),
        "translate-x": affine((1, 0, 5, 0, 1, 0)),
        "translate-y": affine((1, 0, 0, 0, 1, -4)),
        "rotate": image.rotate(27.5, Image.NEAREST, fillcolor=grey),
        "rotate-back": image.rotate(-12, Image.NEAREST, fillcolor=grey),
        "brightness": ImageEnhance.Brightness(image).enhance(1.37),
        "colour": ImageEnhance.Color(image).enhance(0.45),
        "contrast": ImageEnhance.Contrast(image).enhance(1.6),
        "sharpness": ImageEnhance.Sharpness(image).enhance(1.9),
        "blur": ImageEnhance.Sharpness(image).enhance(0.1),
        "posterize": ImageOps.posterize(image, 3),
        "solarize": ImageOps.solarize(image, 113),
        "auto-contrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "invert": ImageOps.invert(image),
    }
    tensors = {name: torch.from_numpy(np.asarray(value).copy()) for name, value in made.items()}
    save_file({"picture": torch.from_numpy(picture.copy()), **tensors}, OUT / "colours.safetensors")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    gradients()
    trajectory("a", "lr-plain", "A")
    trajectory("b", "lr", "B")
    colours()
