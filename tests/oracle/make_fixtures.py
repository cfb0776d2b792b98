"""Writes tests/data/checkpoints: small checkpoints of every layout, and PyTorch's own f64 logits for a seeded input.

    python tests/oracle/make_fixtures.py      # needs torch, numpy, safetensors
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import networks

OUT = Path(__file__).parents[1] / "data" / "checkpoints"
SIDES = {"imagenet": 64, "cifar": 32}


class Foreign:
    """Pickles as a call that would leave a file behind, if anything ran it."""

    def __reduce__(self):
        return (exec, ("open('/tmp/nbn-pickle-ran', 'w')",))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    expected = {}
    for seed, name in enumerate(networks.LAYOUTS):
        arch, model = networks.small(name)
        networks.enliven(model, seed, tiny_variances=seed % 2 == 1)
        networks.save(model, arch, OUT / f"{name}.pth.tar", prefix="module." if seed % 2 else "")
        networks.save(model, arch, OUT / f"{name}_other.pth.tar", prefix="" if seed % 2 else "module.")
        record(expected, name, model, SIDES["imagenet"], seed)
    for seed, (name, option, norm, head) in enumerate([
        ("cifar_a", "A", "nbn", "lr-plain"), ("cifar_b", "B", "nbn", "lr"), ("cifar_bn", "A", "bn", "linear"),
    ], start=100):
        arch, model = networks.cifar(option, norm, head)
        networks.enliven(model, seed)
        networks.save(model, arch, OUT / f"{name}.pth.tar")
        record(expected, name, model, SIDES["cifar"], seed)
    # The last one again, as safetensors with metadata, and a bare state dict.
    arch, model = networks.cifar("A")
    networks.enliven(model, 100)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, OUT / "cifar_a.safetensors", metadata={"nbn.format": "1", "nbn.layers": "last-stage-outputs"})
    torch.save(state, OUT / "cifar_a_bare.pt")
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, OUT / "cifar_a_half.pt")
    torch.save({"state_dict": state, "optimizer": Foreign()}, OUT / "cifar_a_foreign.pth.tar")
    save_file(expected, OUT / "expected.safetensors")


@torch.no_grad()
def record(expected, name, model, side, seed):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1000 + seed))
    expected[f"{name}.images"] = images
    expected[f"{name}.logits"] = model.double()(images.double())
    model.float()


if __name__ == "__main__":
    main()
