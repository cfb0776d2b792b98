"""Makes tests/data/onnx: small networks in ONNX, as exporters write them, and files that cannot be served.

    python tests/oracle/make_onnx.py     # needs torch, onnx, onnxruntime, onnxscript, pillow

`expected.json` has, for each network that can be served, one input and what PyTorch, or ONNX Runtime on the original, gives
for it; `picture_N.f32` are the inputs.
"""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional as F

OUT = Path(__file__).parents[1] / "data" / "onnx"
SIDE = 16
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Nbn(nn.BatchNorm2d):
    """Weight and bias are directions times `alpha`; `form` is how the normalisation is written."""

    def __init__(self, channels, form):
        super().__init__(channels)
        self.form = form
        self.alpha = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        def unit(v):
            if self.form == "clamped":
                return F.normalize(v, dim=0)
            return v / (v.norm(2) + 1e-6)

        if self.form == "affine outside":
            y = F.batch_norm(x, self.running_mean, self.running_var, None, None, False, 0.0, self.eps)
            return y * (self.alpha * unit(self.weight))[:, None, None] + (self.alpha * unit(self.bias))[:, None, None]
        bias = self.bias if self.form == "weight only" else self.alpha * unit(self.bias)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.alpha * unit(self.weight), bias, False, 0.0, self.eps
        )


class Small(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn2 = Nbn(6, form)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.bn3 = nn.BatchNorm2d(4)
        self.bn4 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.rectify = nn.BatchNorm1d(5)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        # The norm's result has two readers.
        z = self.bn2(self.conv2(y))
        y = F.relu(z + y) + z
        y = F.relu(self.bn3(self.up(y)))
        y = self.bn4(y).mean((2, 3))
        return self.rectify(self.fc(y))


def lively(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.2)
    return model.eval()


def strip(path):
    """Exporters write where on the machine each node comes from."""
    model = onnx.load(path)
    parts = [model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    for function in model.functions:
        parts += [function, *function.node]
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.save(model, path)


def picture(seed):
    return np.random.default_rng(seed).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


def initializer(name, values, kind=np.float32):
    return numpy_helper.from_array(np.asarray(values, kind), name)


def graph(nodes, initializers, inputs=None, outputs=None, **model):
    if inputs is None:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])]
    if outputs is None:
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(
        made, ir_version=8, opset_imports=model.pop("opset_imports", [helper.make_opsetid("", 17)]), **model
    )


RNG = np.random.default_rng(0)
WEIGHT = initializer("w", RNG.standard_normal((4, 3)) * 0.5)
BIAS = initializer("b", RNG.standard_normal(4))
POOL = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["f"])]
GEMM = helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)


def good():
    """Name → model, and what gives its logits (or what it ends in)."""
    ended = lambda op, **attributes: [
        *POOL, helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1), helper.make_node(op, ["z"], ["y"], **attributes)
    ]
    yield "softmax", graph(ended("Softmax", axis=-1), [WEIGHT, BIAS])
    yield "logsoftmax", graph(ended("LogSoftmax", axis=1), [WEIGHT, BIAS])
    # A function of the file's own, called twice, with an attribute of the call and a default.
    body = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["a", "two"], ["t"]),
        helper.make_node("LeakyRelu", ["t"], ["c"]),
    ]
    slope = body[2].attribute.add()
    slope.name, slope.ref_attr_name, slope.type = "alpha", "slope", onnx.AttributeProto.FLOAT
    function = helper.make_function("own", "twice", ["a"], ["c"], body, [helper.make_opsetid("", 17)], ["slope"])
    nodes = [
        *POOL,
        helper.make_node("twice", ["f"], ["g"], domain="own", slope=0.25),
        helper.make_node("twice", ["g"], ["h"], domain="own", slope=0.5),
        helper.make_node("Gemm", ["h", "w", "b"], ["y"], transB=1),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    yield "function", graph(nodes, [WEIGHT, BIAS], functions=[function], opset_imports=imports)
    # Channels last, as TensorFlow has it, 0 to 255, a softmax at the end.
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["f"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["f", "wt"], ["m"]), helper.make_node("Add", ["m", "b"], ["z"]),
        helper.make_node("Softmax", ["z"], ["y"], axis=-1),
    ]
    initializers = [initializer("scale", 1 / 255), BIAS, initializer("wt", RNG.standard_normal((3, 4)))]
    last = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIDE, SIDE, 3])]
    yield "channels_last", graph(nodes, initializers, last)
    # The norm's output is called as the classifier is, whose weight has the name that a merged weight would get; a bias
    # that lies along the tokens before a scale that lies along the channels.
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "g", "o", "o", "g"], ["fc"]),
        helper.make_node("Reshape", ["fc", "tokens"], ["t"]),
        helper.make_node("MatMul", ["t", "fc.weight"], ["m"]), helper.make_node("Add", ["m", "fc.bias"], ["a"]),
        helper.make_node("Mul", ["a", "g"], ["s"]), helper.make_node("ReduceMean", ["s"], ["y"], axes=[1], keepdims=0),
    ]
    initializers = [
        initializer("k", RNG.standard_normal((4, 3, 3, 3))), initializer("g", [0.5, 1.0, 1.5, 2.0]),
        initializer("o", [0.1, 0.2, 0.3, 0.4]), initializer("tokens", [-1, 4, 256], np.int64),
        initializer("fc.weight", RNG.standard_normal((256, 4))), initializer("fc.bias", RNG.standard_normal((4, 1))),
    ]
    yield "taken_names", graph(nodes, initializers)
    # Made for one picture: shapes hold the 1.
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Reshape", ["p", "s"], ["f"]),
        helper.make_node("Reshape", ["f", "s3"], ["f3"]),
        helper.make_node("Concat", ["token", "f3"], ["t"], axis=1),
        helper.make_node("ReduceSum", ["t", "axes"], ["q"], keepdims=0),
        helper.make_node("MatMul", ["q", "wt"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    initializers = [
        initializer("s", [1, 3], np.int64), initializer("s3", [1, 1, 3], np.int64), initializer("axes", [1], np.int64),
        initializer("token", RNG.standard_normal((1, 2, 3))), BIAS,
        initializer("wt", RNG.standard_normal((3, 4))),
    ]
    one = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    yield "fixed_batch", graph(nodes, initializers, one, out)
    # A picture at a time: its values are picked one by one.
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Reshape", ["p", "flat"], ["v"]),
        helper.make_node("Gather", ["v", "picks"], ["f"]),
        GEMM,
    ]
    initializers = [initializer("flat", [-1], np.int64), initializer("picks", [[0, 1, 2]], np.int64), WEIGHT, BIAS]
    yield "one_by_one", graph(nodes, initializers, one, out)


def bad():
    """Name → model that cannot be served."""
    yield "cycle", graph([*POOL, helper.make_node("Add", ["f", "h"], ["g"]), helper.make_node("Relu", ["g"], ["h"]),
                          helper.make_node("Gemm", ["h", "w", "b"], ["y"], transB=1)], [WEIGHT, BIAS])
    custom = [*POOL, helper.make_node("Hash", ["f"], ["g"], domain="mine"), helper.make_node("Gemm", ["g", "w", "b"], ["y"], transB=1)]
    yield "custom_operator", graph(custom, [WEIGHT, BIAS], opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)])
    image = lambda name, kind=TensorProto.FLOAT, height=SIDE: helper.make_tensor_value_info(name, kind, ["n", 3, height, SIDE])
    yield "open_height", graph([*POOL, GEMM], [WEIGHT, BIAS], [image("x", height="h")])
    two = [helper.make_node("Add", ["x", "x2"], ["s"]), helper.make_node("GlobalAveragePool", ["s"], ["p"]), POOL[1], GEMM]
    yield "two_inputs", graph(two, [WEIGHT, BIAS], [image("x"), image("x2")])
    yield "integer_input", graph([helper.make_node("Cast", ["u"], ["x"], to=1), *POOL, GEMM], [WEIGHT, BIAS], [image("u", TensorProto.UINT8)])
    half = numpy_helper.from_array(numpy_helper.to_array(WEIGHT).astype(np.float16), "w16")
    yield "half_weights", graph([*POOL, helper.make_node("Cast", ["w16"], ["w"], to=1), GEMM], [half, BIAS])
    yield "no_rows", graph(POOL[:1], [], outputs=[helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 3, 1, 1])])
    yield "sigmoid", graph([*POOL, helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1), helper.make_node("Sigmoid", ["z"], ["y"])], [WEIGHT, BIAS])
    both = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("y", "y2")]
    yield "two_outputs", graph([*POOL, GEMM, helper.make_node("Relu", ["y"], ["y2"])], [WEIGHT, BIAS], outputs=both)
    for name, location in (("missing_external", "weights.bin"), ("external_outside", "../weights.bin")):
        model = graph([*POOL, GEMM], [WEIGHT, BIAS])
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "48")):
            tensor.external_data.add(key=key, value=value)
        yield name, model
    ended = [*POOL, helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1), helper.make_node("Softmax", ["z"], ["s"]), helper.make_node("Flatten", ["s"], ["y"])]
    yield "hidden_softmax", graph(ended, [WEIGHT, BIAS])
    drawn = [*POOL, helper.make_node("RandomNormalLike", ["f"], ["r"]), helper.make_node("Gemm", ["r", "w", "b"], ["y"], transB=1)]
    yield "random", graph(drawn, [WEIGHT, BIAS])
    token = [*POOL, helper.make_node("Reshape", ["f", "s3"], ["f3"]), helper.make_node("Concat", ["token", "f3"], ["t"], axis=1),
             helper.make_node("ReduceSum", ["t", "axes"], ["q"], keepdims=0), helper.make_node("Gemm", ["q", "w", "b"], ["y"], transB=1)]
    initializers = [initializer("s3", [8, 1, 3], np.int64), initializer("token", RNG.standard_normal((8, 1, 3))),
                    initializer("axes", [1], np.int64), WEIGHT, BIAS]
    eight = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 3, SIDE, SIDE])]
    yield "eight_at_a_time", graph(token, initializers, eight, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 4])])
    constant = [*POOL, helper.make_node("Mul", ["f", "zero"], ["z"]), helper.make_node("Gemm", ["z", "w", "b"], ["y"], transB=1)]
    yield "blind", graph(constant, [WEIGHT, BIAS, initializer("zero", 0.0)])
    short = graph([*POOL, GEMM], [WEIGHT, BIAS])
    short.graph.initializer[0].dims[0] = 1 << 40
    yield "short_weight", short
    newer = graph([*POOL, GEMM], [WEIGHT, BIAS])
    newer.ir_version = 99
    yield "newer_ir", newer
    yield "written_softmax", written_softmax()
    norm = helper.make_node("BatchNormalization", ["x", "g", "o", "o", "g"], ["n", "m", "v"], name="norm", training_mode=1)
    statistics = [initializer("g", [0.5, 1.0, 1.5]), initializer("o", [0.1, 0.2, 0.3])]
    pool = [helper.make_node("GlobalAveragePool", ["n"], ["p"]), POOL[1]]
    yield "training_norm", graph([norm, *pool, GEMM], [WEIGHT, BIAS, *statistics])
    drop = helper.make_node("Dropout", ["f", "ratio", "training"], ["d"], name="drop")
    gemm = helper.make_node("Gemm", ["d", "w", "b"], ["y"], transB=1)
    training = numpy_helper.from_array(np.array(True), "training")
    yield "training_dropout", graph([*POOL, drop, gemm], [WEIGHT, BIAS, initializer("ratio", 0.5), training])


def written_softmax():
    """A softmax as its formula."""
    nodes = [
        *POOL, helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1),
        helper.make_node("ReduceMax", ["z"], ["most"], axes=[1]), helper.make_node("Sub", ["z", "most"], ["less"]),
        helper.make_node("Exp", ["less"], ["e"]), helper.make_node("ReduceSum", ["e", "axes"], ["sum"]),
        helper.make_node("Div", ["e", "sum"], ["y"]),
    ]
    return graph(nodes, [WEIGHT, BIAS, initializer("axes", [1], np.int64)])


def two_heads():
    """The sum of two classifiers, neither of whose inputs is what the network sees."""
    nodes = [
        *POOL, helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1), helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("Gemm", ["r", "w", "b"], ["z2"], transB=1), helper.make_node("Add", ["z", "z2"], ["y"]),
    ]
    return graph(nodes, [WEIGHT, BIAS])


def grey_wide():
    """One channel, which is last, and 12×20 pixels; its expected outputs are those of photo.jpg."""
    random = np.random.default_rng(5)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], axis=1), helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "v"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    initializers = [
        initializer("w", random.standard_normal((240, 8)) / 16), initializer("v", random.standard_normal((8, 4))), BIAS,
    ]
    return graph(nodes, initializers, [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12, 20, 1])])


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    expected = {}
    for seed, form in enumerate(["added", "clamped", "weight only", "affine outside"]):
        torch.manual_seed(seed)
        model = lively(Small(form), seed)
        x = torch.from_numpy(picture(seed))
        for dynamo in (False, True):
            name = f"nbn_{form.replace(' ', '_')}_{'dynamo' if dynamo else 'script'}"
            if dynamo:
                torch.onnx.export(model, (x,), OUT / f"{name}.onnx", dynamo=True, verbose=False, optimize=False, external_data=False)
            else:
                torch.onnx.export(
                    model, (x,), OUT / f"{name}.onnx", dynamo=False, opset_version=17, input_names=["x"],
                    output_names=["y"], dynamic_axes={"x": {0: "n"}}, training=torch.onnx.TrainingMode.PRESERVE,
                    do_constant_folding=False,
                )
            strip(OUT / f"{name}.onnx")
            with torch.no_grad():
                expected[name] = {"seed": seed, "logits": model(x)[0].tolist()}
    for name, model in good():
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, OUT / f"{name}.onnx")
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        x = picture(9)
        y = session.run(None, {"x": x.transpose(0, 2, 3, 1) if name == "channels_last" else x})[0]
        expected[name] = {"seed": 9, "outputs": np.asarray(y)[0].tolist()}
    onnx.save(two_heads(), OUT / "two_heads.onnx")
    model = grey_wide()
    onnx.save(model, OUT / "grey_wide.onnx")
    image = Image.open(OUT.parent / "pixels" / "photo.jpg").convert("L").resize((20, 12), Image.BILINEAR)
    x = ((np.asarray(image, np.float32) / np.float32(255) - np.float32(0.45)) / np.float32(0.225))[None, :, :, None]
    y = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    expected["grey_wide"] = {"seed": 9, "outputs": y[0].tolist()}
    for name, model in bad():
        onnx.save(model, OUT / f"bad_{name}.onnx")
    for entry in expected.values():
        entry["picture"] = float(picture(entry["seed"]).sum())
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for name in sorted({entry["seed"] for entry in expected.values()}):
        picture(name).tofile(OUT / f"picture_{name}.f32")


if __name__ == "__main__":
    main()
