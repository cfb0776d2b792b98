"""A Hugging Face classifier from its own files to scores: exports it, folds it with its preprocessor_config.json, and
compares the logits of `nbn score` with its own on a folder of photos.

    cargo build --release && python tests/oracle/hugging_face_end_to_end.py PHOTOS     # needs transformers, torch, onnx, pillow
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

PROGRAMS = Path(__file__).parents[2] / "target" / "release"
SIDE = 96


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


@torch.no_grad()
def main():
    photos = sorted(Path(sys.argv[1]).glob("*.jpg"))[:20]
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor = processor(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=SIDE, patch_size=16,
        num_labels=6, initializer_range=0.1, attn_implementation="eager",
    )
    model = Logits(transformers.ViTForImageClassification(config)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor.save_pretrained(folder)
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        torch.onnx.export(
            model, (torch.zeros(1, 3, SIDE, SIDE),), folder / "network.onnx", dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes=axes,
        )
        command = [PROGRAMS / "nbn-fold", "export", folder / "network.onnx", "--out", folder / "models/hf/1"]
        subprocess.run([*command, "--preprocessing", folder / "preprocessor_config.json"], check=True)
        command = [PROGRAMS / "nbn", "score", "--model", folder / "models/hf", "--logits", *photos]
        rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = np.array([json.loads(row)["logits"] for row in rows])
    pixels = [processor(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"][0] for path in photos]
    expected = model(torch.from_numpy(np.stack(pixels).astype(np.float32))).numpy()
    difference = np.abs(found - expected).max() / expected.std()
    print(f"{len(photos)} photos: logits differ from Hugging Face's by {difference:.1e} of their standard deviation")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
