"""What every server here runs on a picture: Pillow, then ONNX Runtime, one session of one thread a process."""

import io
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image


class Network:
    def __init__(self):
        folder = Path(os.environ["BUNDLE"])
        manifest = json.loads((folder / "manifest.json").read_text())
        self.labels = [c["label"] for c in manifest["classes"]]
        self.how = manifest["preprocessing"]
        # (value / 255 - mean) / std, in one multiplication and one addition.
        std = np.array(self.how["std"], np.float32)
        self.scale = 1 / (255 * std)
        self.shift = -np.array(self.how["mean"], np.float32) / std
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.run(np.zeros((1, 3, self.how["crop"], self.how["crop"]), np.float32))

    def run(self, batch):
        return self.session.run(["logits"], {self.input: batch})[0]

    def prepare(self, encoded):
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        width, height = image.size
        shorter, crop = self.how["shorter_side"], self.how["crop"]
        ratio = shorter / min(width, height)
        if ratio != 1:
            image = image.resize((max(shorter, int(width * ratio)), max(shorter, int(height * ratio))), Image.BILINEAR)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) * self.scale + self.shift
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]

    def classify(self, encoded):
        logits = self.run(self.prepare(encoded))[0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        return [{"label": self.labels[k], "score": float(scores[k])} for k in np.argsort(-scores)[:5]]
