"""Keras classifiers (channels last, a softmax at the end) through tf2onnx to scores, compared with Keras's own: one that takes
0 to 255, and one for each way of Keras's `preprocess_input`.

    cargo build --release && python tests/oracle/keras_end_to_end.py PHOTOS     # needs tensorflow-cpu, tf2onnx, pillow
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf2onnx
from PIL import Image
from tensorflow.keras import Input, Sequential, layers

PROGRAMS = Path(__file__).parents[2] / "target" / "release"
SIDE = 64


BYTES = ["--factor", "1", "--mean", "0,0,0", "--std", "1,1,1"]
# How `preprocess_input` is said: docs/export.md has the same.
MODES = {
    "bytes": BYTES,
    "tf": ["--divisor", "127.5", "--mean", "1,1,1", "--std", "1,1,1"],
    "torch": ["--preprocessing", "imagenet"],
    "caffe": ["--color", "bgr", "--factor", "1", "--mean", "103.939,116.779,123.68", "--std", "1,1,1"],
}


def network(mode):
    tf.random.set_seed(0)
    scale = [layers.Rescaling(1 / 127.5, offset=-1)] if mode == "bytes" else []
    if mode == "caffe":
        scale = [layers.Rescaling(1 / 100)]
    model = Sequential([
        Input((SIDE, SIDE, 3)), *scale,
        layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU(),
        layers.DepthwiseConv2D(3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU(6.0),
        layers.Conv2D(32, 1, use_bias=False), layers.BatchNormalization(), layers.GlobalAveragePooling2D(),
        layers.Dropout(0.2), layers.Dense(5, activation="softmax"),
    ])
    random = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            weight, bias, mean, variance = layer.get_weights()
            layer.set_weights([
                random.uniform(0.5, 1.5, weight.shape), random.normal(0, 0.2, bias.shape),
                random.normal(0, 0.2, mean.shape), random.uniform(0.2, 1, variance.shape),
            ])
    return model


def main():
    for mode in MODES:
        check(mode)


def check(mode):
    photos = sorted(Path(sys.argv[1]).glob("*.jpg"))[:20]
    model = network(mode)
    signature = (tf.TensorSpec((None, SIDE, SIDE, 3), tf.float32, name="input"),)
    function = tf.function(lambda input: model(input, training=False), input_signature=signature)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tf2onnx.convert.from_function(
            function, input_signature=signature, opset=17, output_path=str(folder / "network.onnx")
        )
        command = [PROGRAMS / "nbn-fold", "export", folder / "network.onnx", "--out", folder / "models/keras/1"]
        flags = [*MODES[mode], "--resize", "both", "--resize-to", str(SIDE)]
        subprocess.run([*command, *flags], check=True)
        input_shape = json.loads((folder / "models/keras/1/manifest.json").read_text())["preprocessing"]["layout"]
        assert input_shape == "nhwc"
        command = [PROGRAMS / "nbn", "score", "--model", folder / "models/keras", "--probabilities", *photos]
        rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = np.array([json.loads(row)["probabilities"] for row in rows])
    resized = [Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.BILINEAR) for path in photos]
    inputs = np.stack([np.asarray(image, np.float32) for image in resized])
    if mode != "bytes":
        inputs = tf.keras.applications.imagenet_utils.preprocess_input(inputs, mode=mode)
    expected = model(inputs, training=False).numpy()
    difference = np.abs(found - expected).max()
    assert expected.std() > 0.01
    print(f"{mode}: {len(photos)} photos: probabilities differ from Keras's by {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
