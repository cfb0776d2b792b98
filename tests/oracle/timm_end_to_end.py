"""Runs docs/export.md, "Your timm model in ten minutes", as it stands, on drawn pictures and without pretrained weights.

    cargo build --release && python tests/oracle/timm_end_to_end.py     # needs timm, torch, onnx, onnxruntime, pillow

Then compares the logits that `nbn score` gives with the model's own in PyTorch.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]


def draw(folder):
    rng = np.random.default_rng(0)
    for part, many in (("train", 30), ("held-out", 20), ("test", 15)):
        for label, count in (("circle", many), ("square", many // 2), ("triangle", many // 3)):
            (folder / "photos" / part / label).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(rng.integers(0, 90, (rng.integers(200, 400), 300, 3), dtype=np.uint8))
                x, y, r = *rng.integers(60, 140, 2), int(rng.integers(20, 60))
                shape = {"circle": ImageDraw.Draw(image).ellipse, "square": ImageDraw.Draw(image).rectangle}.get(label)
                colour = tuple(int(c) for c in rng.integers(120, 255, 3))
                if shape:
                    shape([x - r, y - r, x + r, y + r], fill=colour)
                else:
                    ImageDraw.Draw(image).polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
                image.save(folder / "photos" / part / label / f"{n}.png")


def main():
    text = (ROOT / "docs/export.md").read_text()
    section = text[text.index("## Your timm model") : text.index("## Preprocessing")]
    python, shell = re.findall(r"```python\n(.*?)```\n\n```sh\n(.*?)```", section, re.S)[0]
    assert "pretrained=True" in python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder)
        os.chdir(folder)
        torch.manual_seed(0)
        scope = {}
        # Without training, logits would hardly differ.
        line = '# model.load_state_dict(torch.load("your-checkpoint.pth"))'
        assert line in python
        python = python.replace(line, "torch.nn.init.normal_(model.classifier.weight)")
        exec(python.replace("pretrained=True", "pretrained=False"), scope)
        environment = {**os.environ, "PATH": f"{ROOT / 'target/release'}:{os.environ['PATH']}"}
        commands = [line for line in shell.splitlines() if not line.startswith("nbn serve")]
        for command in commands:
            subprocess.run(command, shell=True, check=True, env=environment)
        server = subprocess.Popen(["nbn", "serve", "--models", "models", "--addr", "127.0.0.1:18093"], env=environment)
        try:
            check(scope["model"], folder, environment)
        finally:
            server.terminate()
            server.wait()


@torch.no_grad()
def check(model, folder, environment):
    import time
    import urllib.request

    command = "nbn score --model models/mine --logits photos/test > logits.jsonl"
    subprocess.run(command, shell=True, check=True, env=environment)
    rows = [json.loads(line) for line in Path("logits.jsonl").read_text().splitlines()]
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    inputs = torch.stack([transform(Image.open(row["path"]).convert("RGB")) for row in rows])
    expected = model(inputs)
    found = torch.tensor([row["logits"] for row in rows])
    difference = ((found - expected).abs().max() / expected.std()).item()
    print(f"{len(rows)} pictures: logits differ from timm's by {difference:.1e} of their standard deviation")
    assert difference < 1e-4
    for _ in range(100):
        try:
            urllib.request.urlopen("http://127.0.0.1:18093/readyz")
            break
        except OSError:
            time.sleep(0.1)
    request = urllib.request.Request(
        "http://127.0.0.1:18093/v1/classify", Path(rows[0]["path"]).read_bytes(), {"content-type": "image/png"}
    )
    answer = json.load(urllib.request.urlopen(request))
    print(answer["scale"], answer["results"][0]["predictions"][0])
    assert answer["scale"] == "calibrated"


if __name__ == "__main__":
    main()
