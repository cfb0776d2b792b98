"""The Open Inference Protocol v2 as Triton's own Python client speaks it, over HTTP and gRPC, beside the native API.

    python triton.py HTTP_HOST:PORT GRPC_HOST:PORT [--model cifar10-lt]

The server needs --control: its model is unloaded and loaded again. Both addresses may be the same.
"""

import argparse
import asyncio
import contextlib
import json
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import grpc
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from common import Report, encoded, picture

OUTPUTS = ["logits", "probabilities", "set", "familiarity"]
EXTENSIONS = {"binary_tensor_data", "classification", "statistics", "model_repository"}
STAGES = ["queue", "compute_input", "compute_infer", "compute_output"]
# What InferenceServerException.status() says.
INVALID = {"http": {"400"}, "grpc": {"StatusCode.INVALID_ARGUMENT"}}
TOO_MANY = {"http": {"413"}, "grpc": {"StatusCode.RESOURCE_EXHAUSTED"}}
BAD_IMAGE = {"http": {"400", "422"}, "grpc": {"StatusCode.INVALID_ARGUMENT"}}
NOT_FOUND = {"http": {"404"}, "grpc": {"StatusCode.NOT_FOUND"}}
DEADLINE = {"http": {"504"}, "grpc": {"StatusCode.DEADLINE_EXCEEDED"}}
UNLOADED = {"http": {"404", "503"}, "grpc": {"StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}}
NO_UPLOAD = {
    "http": {"400", "403", "501"},
    "grpc": {"StatusCode.INVALID_ARGUMENT", "StatusCode.PERMISSION_DENIED", "StatusCode.UNIMPLEMENTED"},
}


def expect(found, wanted, what="it"):
    assert found == wanted, f"{what} is {found!r}, not {wanted!r}"


def same_bits(found, wanted, what):
    """Equal in type, shape and every bit."""
    assert found is not None, f"{what} is missing"
    expect((found.dtype, found.shape), (wanted.dtype, wanted.shape), what)
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    assert found.tobytes() == wanted.tobytes(), f"{what} differs by up to {difference:g}"


def close(found, wanted, what, tolerance):
    assert found is not None, f"{what} is missing"
    expect(found.shape, wanted.shape, what)
    difference = np.abs(found.astype(np.float64) - wanted).max()
    assert difference <= tolerance, f"{what} differs by {difference:g}, more than {tolerance:g}"
    return difference


def http_call(url, body=None, headers=None, method=None):
    """Status, headers and body; an error status is no exception."""
    request = urllib.request.Request(url, data=body, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as reply:
        with reply:
            return reply.code, reply.headers, reply.read()


class Native:
    """The native API: what the other protocols are compared with."""

    def __init__(self, base, model):
        self.base, self.model = base, model
        status, _, body = http_call(f"{base}/v1/models/{model}")
        expect(status, 200, f"status of /v1/models/{model}")
        manifest = json.loads(body)["manifest"]
        self.classes = [entry["label"] for entry in manifest["classes"]]
        self.preprocessing = manifest["preprocessing"]

    def classify(self, image, **options):
        """Logits and probabilities of one image as arrays [1, K], its set as [1, K] when alpha is given."""
        query = urllib.parse.urlencode({"include": "logits", "top_k": len(self.classes), **options})
        url = f"{self.base}/v1/models/{self.model}/classify?{query}"
        status, _, body = http_call(url, image, {"content-type": "application/octet-stream"})
        expect(status, 200, f"status of the native API, which says {body[:200]!r}")
        result = json.loads(body)["results"][0]
        scores = np.zeros((1, len(self.classes)))
        for entry in result["predictions"]:
            scores[0, entry["class_id"]] = entry["score"]
        members = np.zeros((1, len(self.classes)), bool)
        members[0, result.get("set", {}).get("class_ids", [])] = True
        return np.array([result["logits"]], np.float32), scores, members

    def familiarity(self, image):
        """How like the training images one image is, as an array [1, 1]."""
        url = f"{self.base}/v1/models/{self.model}/classify?include=familiarity"
        status, _, body = http_call(url, image, {"content-type": "application/octet-stream"})
        expect(status, 200, f"status of the native API, which says {body[:200]!r}")
        return np.array([[json.loads(body)["results"][0]["familiarity"]["p"]]])

    def normalised(self, image):
        """A picture of the network's size as its input [1, 3, H, W]."""
        pixels = np.asarray(image, np.float32) / np.float32(255)
        mean, std = (np.array(self.preprocessing[key], np.float32) for key in ("mean", "std"))
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[np.newaxis])


class Protocol:
    """One protocol's synchronous client; both are called alike."""

    def __init__(self, name, address, model):
        self.name, self.model = name, model
        self.module = {"http": triton_http, "grpc": triton_grpc}[name]
        self.client = self.module.InferenceServerClient(address)

    def input(self, name, array, binary=True):
        tensor = self.module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        return tensor.set_data_from_numpy(array, **({"binary_data": binary} if self.name == "http" else {}))

    def outputs(self, names, binary=True, class_count=0):
        extra = {"binary_data": binary} if self.name == "http" else {}
        return [self.module.InferRequestedOutput(name, class_count=class_count, **extra) for name in names]

    def infer(self, inputs, outputs=("logits",), model=None, **options):
        wanted = self.outputs(outputs) if outputs and isinstance(outputs[0], str) else outputs
        return self.client.infer(model or self.model, inputs, outputs=wanted, **options)

    def dictionary(self, answer):
        """An answer as JSON has it: gRPC's 64-bit numbers become numbers again."""
        if self.name == "http":
            return answer
        return MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    def statistics(self, *names):
        """The figures of every model and version, flat, those of its batch sizes added up."""
        figures = {}
        for stats in self.dictionary(self.client.get_inference_statistics(*names))["model_stats"]:
            batches, stages = stats["batch_stats"], stats["inference_stats"]
            of_model = {key: int(stats[key]) for key in ("inference_count", "execution_count", "last_inference")}
            of_model |= {stage: int(stages[stage]["count"]) for stage in ("success", "fail", *STAGES)}
            of_model |= {f"batches' {s}": sum(int(batch[s]["count"]) for batch in batches) for s in STAGES[1:]}
            of_model["batched"] = sum(int(b["batch_size"]) * int(b["compute_infer"]["count"]) for b in batches)
            of_model["ns"] = int(stages["success"]["ns"])
            figures[stats["name"], stats["version"]] = of_model
        return figures

    @contextlib.contextmanager
    def refused(self, statuses, mention=""):
        """The body must be refused with one of these statuses and a message."""
        try:
            yield
        except InferenceServerException as error:
            allowed = statuses[self.name]
            assert error.status() in allowed, f"status is {error.status()}, not {allowed}: {error.message()}"
            assert error.message() and mention in error.message(), f"the message does not help: {error.message()!r}"
        else:
            raise AssertionError("it was accepted")


def of_bytes(*elements):
    return np.array(elements, dtype=np.object_)


def check_server(report, protocol, native, version):
    name, client, model = protocol.name, protocol.client, protocol.model
    with report.check(f"{name}: server is live and ready"):
        assert client.is_server_live() is True
        assert client.is_server_ready() is True
    with report.check(f"{name}: server metadata") as figures:
        metadata = protocol.dictionary(client.get_server_metadata())
        assert metadata["name"] and metadata["version"]
        assert EXTENSIONS <= set(metadata["extensions"]), f"missing: {EXTENSIONS - set(metadata['extensions'])}"
        figures.append(f"{metadata['name']} {metadata['version']}")
    with report.check(f"{name}: model metadata"):
        metadata = protocol.dictionary(client.get_model_metadata(model))
        expect(metadata["name"], model, "name")
        assert metadata["platform"] and all(version.isdecimal() for version in metadata["versions"]), metadata
        shapes = {
            entry["name"]: (entry["datatype"], [int(n) for n in entry["shape"]])
            for entry in metadata["inputs"] + metadata["outputs"]
        }
        side, k = native.preprocessing["crop"], len(native.classes)
        expect({entry["name"] for entry in metadata["inputs"]}, {"images", "image"}, "the set of inputs")
        expect(shapes["images"], ("FP32", [-1, 3, side, side]), "images")
        expect(shapes["image"], ("BYTES", [-1, 1]), "image")
        expect([entry["name"] for entry in metadata["outputs"]], OUTPUTS, "the list of outputs")
        expect(shapes["logits"], ("FP32", [-1, k]), "logits")
        expect(shapes["probabilities"], ("FP32", [-1, k]), "probabilities")
        expect(shapes["set"], ("BOOL", [-1, k]), "set")
        expect(shapes["familiarity"], ("FP32", [-1, 1]), "familiarity")
        expect(protocol.dictionary(client.get_model_metadata(model, version)), metadata, f"version {version}'s")
    with report.check(f"{name}: model configuration"):
        config = protocol.dictionary(client.get_model_config(model))
        # Over gRPC it is one field of the answer.
        config = config.get("config", config)
        expect((config["name"], config["platform"], config["backend"]), (model, metadata["platform"], "onnxruntime"))
        assert config["max_batch_size"] >= 1, config
        tensors = {
            entry["name"]: (entry["data_type"], [int(n) for n in entry.get("dims", [])])
            for entry in config["input"] + config["output"]
        }
        expect(tensors["images"], ("TYPE_FP32", [3, side, side]), "images")
        expect(tensors["image"], ("TYPE_STRING", [1]), "image")
        expect(tensors["set"], ("TYPE_BOOL", [k]), "set")
        expect(tensors["familiarity"], ("TYPE_FP32", [1]), "familiarity")
    with report.check(f"{name}: model is ready, an unknown name or version is not"):
        assert client.is_model_ready(model) is True
        assert client.is_model_ready(model, version) is True
        for wrong in [("nobody",), (model, "99")]:
            try:
                ready = client.is_model_ready(*wrong)
            except InferenceServerException as error:
                assert name == "grpc" and error.status() in NOT_FOUND["grpc"], error
            else:
                assert ready is False, f"{wrong} is ready"
    with report.check(f"{name}: metadata and statistics of an unknown model or version"):
        for call in (client.get_model_metadata, client.get_inference_statistics):
            with protocol.refused(NOT_FOUND, "nobody"):
                call("nobody")
            with protocol.refused(NOT_FOUND, "99"):
                call(model, "99")


def check_inference(report, protocol, native, tensor, png, jpeg, reference):
    name = protocol.name
    single = protocol.input("images", tensor)
    with report.check(f"{name}: FP32 binary input and output"):
        result = protocol.infer([single], OUTPUTS, parameters={"nbn_alpha": 0.1})
        answer = protocol.dictionary(result.get_response())
        expect((answer["model_name"], answer["model_version"]), (protocol.model, reference["version"]), "the model")
        expect([output["name"] for output in answer["outputs"]], OUTPUTS, "the list of outputs")
        expect([output["datatype"] for output in answer["outputs"]], ["FP32", "FP32", "BOOL", "FP32"], "the list of types")
        same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
        close(result.as_numpy("probabilities").sum(axis=1), np.ones(1), "the sum of probabilities", 1e-5)
        expect(result.as_numpy("set").dtype, np.dtype(bool), "the set's type")
        assert result.as_numpy("set").any(), "the set is empty"
    for kind, image in [("PNG", png), ("JPEG", jpeg)]:
        with report.check(f"{name}: BYTES {kind} equals the native API"):
            logits, scores, members = native.classify(image, alpha=0.1)
            result = protocol.infer(
                [protocol.input("image", of_bytes(image))], OUTPUTS, parameters={"nbn_alpha": 0.1}
            )
            same_bits(result.as_numpy("logits"), logits, "logits")
            close(result.as_numpy("probabilities"), scores, "probabilities", 1e-6)
            expect(result.as_numpy("set").tolist(), members.tolist(), "the set")
            close(result.as_numpy("familiarity"), native.familiarity(image), "familiarity", 1e-6)
    with report.check(f"{name}: several images in one request, each as alone") as figures:
        images = of_bytes(png, jpeg, png, jpeg, jpeg)
        logits = protocol.infer([protocol.input("image", images)]).as_numpy("logits")
        alone = np.concatenate([native.classify(image)[0] for image in images])
        figures.append(f"largest difference {close(logits, alone, 'logits of BYTES', 1e-4):g}")
        stacked = np.concatenate([tensor, tensor * 0, tensor])
        logits = protocol.infer([protocol.input("images", stacked)]).as_numpy("logits")
        close(logits[[0, 2]], np.concatenate([reference["tensor"]] * 2), "logits of FP32", 1e-4)
    with report.check(f"{name}: outputs: one, two in another order, none named is all"):
        answer = protocol.infer([single], ["probabilities"]).get_response()
        expect([o["name"] for o in protocol.dictionary(answer)["outputs"]], ["probabilities"], "the list of outputs")
        result = protocol.infer([single], ["probabilities", "logits"])
        same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
        close(result.as_numpy("probabilities").sum(axis=1), np.ones(1), "the sum of probabilities", 1e-5)
        result = protocol.infer([single], None)
        expect({o["name"] for o in protocol.dictionary(result.get_response())["outputs"]}, set(OUTPUTS), "the set")
        same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
    with report.check(f"{name}: classification extension"):
        two = protocol.input("image", of_bytes(png, jpeg))
        result = protocol.infer([two], protocol.outputs(["probabilities"], class_count=3))
        strings = result.as_numpy("probabilities")
        expect(strings.shape, (2, 3), "the shape")
        output = protocol.dictionary(result.get_response())["outputs"][0]
        expect(output["datatype"], "BYTES", "the type")
        for row, image in zip(strings, (png, jpeg)):
            _, scores, _ = native.classify(image)
            for string, index in zip(row, np.argsort(-scores[0], kind="stable")):
                value, found, label = string.decode().split(":", 2)
                expect((int(found), label), (index, native.classes[index]), f"index and label of {string}")
                assert abs(float(value) - scores[0, index]) < 1e-4, f"{string} does not carry {scores[0, index]}"
    with report.check(f"{name}: nbn_top_k is classification of every output with scores"):
        best = protocol.infer([single], ["probabilities", "logits", "set"], parameters={"nbn_top_k": 2})
        alone = protocol.infer([single], protocol.outputs(["probabilities", "logits"], class_count=2))
        for output in ("probabilities", "logits"):
            expect(best.as_numpy(output).tolist(), alone.as_numpy(output).tolist(), output)
        expect(best.as_numpy("set").shape, (1, len(native.classes)), "the set's shape")
        with protocol.refused(INVALID):
            protocol.infer([single], ["probabilities"], parameters={"nbn_top_k": -1})
    with report.check(f"{name}: values that overflow in the network"):
        with protocol.refused(BAD_IMAGE, "overflow"):
            protocol.infer([protocol.input("images", np.full_like(tensor, 3e38))])
    with report.check(f"{name}: request id and version"):
        result = protocol.infer([single], request_id="abc-1", model_version=reference["version"])
        expect(protocol.dictionary(result.get_response())["id"], "abc-1", "the id")
    with report.check(f"{name}: parameters nbn_prior and nbn_alpha"):
        for prior, alpha in [("uniform", 0.1), ("train", 0.3)]:
            parameters = {"nbn_prior": prior, "nbn_alpha": alpha}
            inputs = [protocol.input("image", of_bytes(jpeg))]
            result = protocol.infer(inputs, ["probabilities", "set"], parameters=parameters)
            _, scores, members = native.classify(jpeg, prior=prior, alpha=alpha)
            close(result.as_numpy("probabilities"), scores, f"probabilities under {prior}", 1e-6)
            expect(result.as_numpy("set").tolist(), members.tolist(), f"the set at {alpha}")
        for parameters in ({"nbn_prior": "none such"}, {"nbn_alpha": 7.0}):
            with protocol.refused(INVALID):
                protocol.infer(inputs, ["probabilities", "set"], parameters=parameters)
    with report.check(f"{name}: timeout, priority and unknown parameters"):
        parameters = {"colour": "red", "weight": 1.5, "flag": True, "count": 3}
        result = protocol.infer([single], timeout=20_000_000, priority=1, parameters=parameters)
        same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
        with protocol.refused(DEADLINE):
            protocol.infer([single], timeout=1)
    with report.check(f"{name}: an image of 6 MB"):
        large = encoded(picture(2000, 1000, 7), compress_level=0)
        assert len(large) > 5 << 20
        logits = protocol.infer([protocol.input("image", of_bytes(large))]).as_numpy("logits")
        same_bits(logits, native.classify(large)[0], "logits")


def check_errors(report, protocol, tensor, png):
    name, model = protocol.name, protocol.model
    single = protocol.input("images", tensor)
    with report.check(f"{name}: unknown model, version, input, output"):
        with protocol.refused(NOT_FOUND, "nobody"):
            protocol.infer([single], model="nobody")
        for version in ("99", "one"):
            with protocol.refused(NOT_FOUND if version == "99" else {k: INVALID[k] | NOT_FOUND[k] for k in INVALID}):
                protocol.infer([single], model_version=version)
        with protocol.refused(INVALID, "pictures"):
            protocol.infer([protocol.input("pictures", tensor)])
        with protocol.refused(INVALID, "scores"):
            protocol.infer([single], ["scores"])
    with report.check(f"{name}: no input, both inputs, one twice"):
        for inputs in ([], [single, protocol.input("image", of_bytes(png))], [single, single]):
            with protocol.refused(INVALID):
                protocol.infer(inputs)
    with report.check(f"{name}: wrong shape"):
        for wrong in (tensor[0], tensor[:, :, :8, :8], tensor[:, :1], tensor[:0], tensor[..., np.newaxis]):
            with protocol.refused(INVALID):
                protocol.infer([protocol.input("images", np.ascontiguousarray(wrong))])
    with report.check(f"{name}: wrong datatype"):
        for array in (tensor.astype(np.float64), tensor.astype(np.uint8), of_bytes(png)):
            with protocol.refused(INVALID):
                protocol.infer([protocol.input("images", array)])
        with protocol.refused(INVALID):
            protocol.infer([protocol.input("image", tensor)])
    with report.check(f"{name}: not an image, alone and among others"):
        for images in (of_bytes(b"not an image"), of_bytes(b""), of_bytes(png, png[:60], png)):
            with protocol.refused(BAD_IMAGE):
                protocol.infer([protocol.input("image", images)])
    with report.check(f"{name}: wrong byte count"):
        for shape in ([2, *tensor.shape[1:]], [-1, *tensor.shape[1:]]):
            with protocol.refused(INVALID):
                protocol.infer([protocol.input("images", tensor).set_shape(shape)])
        with protocol.refused(TOO_MANY):
            protocol.infer([protocol.input("images", tensor).set_shape([1 << 40, *tensor.shape[1:]])])
        for count in (1, 3):
            with protocol.refused(INVALID):
                protocol.infer([protocol.input("image", of_bytes(png, png)).set_shape([count])])
    with report.check(f"{name}: NaN and infinity"):
        for value in (np.nan, np.inf):
            bad = tensor.copy()
            bad[0, 1, 2, 3] = value
            with protocol.refused(INVALID):
                protocol.infer([protocol.input("images", bad)])
            if name == "http":
                with protocol.refused(INVALID):
                    protocol.infer([protocol.input("images", bad, binary=False)])
    with report.check(f"{name}: classification of -1 classes"):
        with protocol.refused(INVALID):
            protocol.infer([single], protocol.outputs(["probabilities"], class_count=-1))
    with report.check(f"{name}: still answers"):
        assert protocol.client.is_model_ready(model) is True
        protocol.infer([single])


def check_statistics(report, protocol, tensor, png, version):
    name, key = protocol.name, (protocol.model, version)

    def growth(before, wanted):
        """How much the figures grew; the last of them may come a moment after the answer."""
        until = time.monotonic() + 2
        while True:
            after = protocol.statistics(*key)[key]
            grown = {name: after[name] - before[name] for name in after}
            if grown.items() >= wanted.items() or time.monotonic() > until:
                expect({name: grown[name] for name in wanted}, wanted, "the growth")
                return grown, after
            time.sleep(0.05)

    with report.check(f"{name}: statistics grow by what was sent") as figures:
        before = protocol.statistics(*key)[key]
        for _ in range(3):
            protocol.infer([protocol.input("images", tensor)])
        protocol.infer([protocol.input("image", of_bytes(png, png, png, png))])
        wanted = {"success": 4, "fail": 0, "inference_count": 7} | dict.fromkeys(STAGES, 4)
        grown, after = growth(before, wanted)
        executions = grown["execution_count"]
        assert 1 <= executions <= 7, f"execution_count grew by {executions}"
        for stage in STAGES[1:]:
            expect(grown[f"batches' {stage}"], executions, f"the growth of batch_stats' {stage}")
        assert grown["batched"] >= 7, f"batch_stats hold {grown['batched']} images more"
        assert grown["ns"] > 0 and abs(after["last_inference"] / 1000 - time.time()) < 60, after
        figures.append(f"{executions} executions")
    with report.check(f"{name}: statistics count a failure"):
        before = protocol.statistics(*key)[key]
        with protocol.refused(BAD_IMAGE):
            protocol.infer([protocol.input("image", of_bytes(b"not an image"))])
        growth(before, {"success": 0, "fail": 1, "inference_count": 0})
    with report.check(f"{name}: statistics of all models and of all versions"):
        assert key in protocol.statistics(), f"{key} is missing"
        assert key in protocol.statistics(protocol.model), f"{key} is missing"


def check_repository(report, protocol, tensor, reference):
    name, client, model = protocol.name, protocol.client, protocol.model

    def states():
        index = protocol.dictionary(client.get_model_repository_index())
        return {(e["name"], e["version"]): e["state"] for e in (index if name == "http" else index["models"])}

    key = (model, reference["version"])
    with report.check(f"{name}: repository index"):
        expect(states()[key], "READY", "the state")
    with report.check(f"{name}: load refuses uploads, load and unload an unknown model"):
        with protocol.refused(NO_UPLOAD):
            client.load_model(model, config="{}", files={"file:1/model.onnx": b"network"})
        for call in (client.load_model, client.unload_model):
            with protocol.refused(NOT_FOUND, "nobody"):
                call("nobody")
        assert client.is_model_ready(model) is True
    with report.check(f"{name}: load a loaded model, unload, load again"):
        client.load_model(model)
        assert client.is_model_ready(model) is True
        client.unload_model(model)
        try:
            with contextlib.suppress(InferenceServerException):
                assert client.is_model_ready(model) is False, "an unloaded model is ready"
            assert states().get(key) != "READY", f"the state of an unloaded model is {states().get(key)}"
            with protocol.refused(UNLOADED):
                protocol.infer([protocol.input("images", tensor)])
            assert client.is_server_live() is True
        finally:
            client.load_model(model)
        assert client.is_model_ready(model) is True
        expect(states()[key], "READY", "the state")
        logits = protocol.infer([protocol.input("images", tensor)]).as_numpy("logits")
        same_bits(logits, reference["tensor"], "logits")


def check_json(report, protocol, tensor, png, reference):
    """HTTP's tensors in JSON."""
    for binary_in, binary_out in [(False, False), (False, True), (True, False)]:
        with report.check(f"http: FP32 input binary={binary_in}, outputs binary={binary_out}"):
            inputs = [protocol.input("images", tensor, binary_in)]
            result = protocol.infer(inputs, protocol.outputs(OUTPUTS, binary_out), parameters={"nbn_alpha": 0.1})
            same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
            expect(result.as_numpy("set").dtype, np.dtype(bool), "the set's type")
            expect("data" in result.get_output("set"), not binary_out, "data in JSON")
    with report.check("http: binary and JSON outputs in one answer"):
        outputs = protocol.outputs(["logits"], True) + protocol.outputs(["probabilities"], False)
        result = protocol.infer([protocol.input("images", tensor)], outputs + protocol.outputs(["set"], True))
        same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
        close(result.as_numpy("probabilities").sum(axis=1), np.ones(1), "the sum of probabilities", 1e-5)
        expect(result.as_numpy("set").shape, reference["tensor"].shape, "the set's shape")
    with report.check("http: classification in JSON"):
        outputs = protocol.outputs(["logits"], binary=False, class_count=2)
        result = protocol.infer([protocol.input("image", of_bytes(png))], outputs)
        strings = result.as_numpy("logits")
        expect(strings.shape, (1, 2), "the shape")
        expect(int(strings[0, 0].split(":")[1]), int(reference["png"].argmax()), f"the index in {strings[0, 0]}")


def check_raw_http(report, base, model, tensor, png, reference):
    """What no client library sends."""
    url = f"{base}/v2/models/{model}/infer"
    flat, shape = tensor.ravel().tolist(), list(tensor.shape)
    header = "Inference-Header-Content-Length"

    def request(data=None, **changes):
        tensors = [{"name": "images", "datatype": "FP32", "shape": shape, "data": data or flat}]
        return {"inputs": tensors, "outputs": [{"name": "logits"}], **changes}

    def post(body, headers=None, address=url):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        return http_call(address, body, {"content-type": "application/json", **(headers or {})}, "POST")

    def logits(body, headers=None):
        status, reply_headers, reply = post(body, headers)
        expect(status, 200, f"the status, with {reply[:200]!r},")
        result = triton_http.InferResult.from_response_body(reply, False, reply_headers.get(header))
        return result.as_numpy("logits"), reply_headers, reply

    def refused(body, headers=None, statuses=(400,), address=url):
        status, reply_headers, reply = post(body, headers, address)
        assert status in statuses, f"the status is {status}, not {statuses}, with {reply[:200]!r}"
        expect(reply_headers.get_content_type(), "application/json", "the content type")
        message = json.loads(reply)
        assert set(message) == {"error"} and isinstance(message["error"], str) and message["error"], message

    def with_binary(tail, size, name="images", datatype="FP32", form=shape, length=None):
        parameters = {} if size is None else {"binary_data_size": size}
        tensors = [{"name": name, "datatype": datatype, "shape": form, "parameters": parameters}]
        head = json.dumps({"inputs": tensors, "outputs": [{"name": "logits"}]}).encode()
        return head + tail, {header: str(len(head) if length is None else length(head))}

    with report.check("raw http: JSON is answered in JSON, with the usual headers"):
        found, reply_headers, reply = logits(request())
        same_bits(found, reference["tensor"], "logits")
        expect(reply_headers.get_content_type(), "application/json", "the content type")
        assert reply_headers.get(header) is None, f"{header} without binary data"
        for usual in ("x-request-id", "traceparent", "server-timing"):
            assert reply_headers.get(usual), f"{usual} is missing"
        answer = json.loads(reply)
        assert "id" not in answer or answer["id"] == "", answer
        expect([o["name"] for o in answer["outputs"]], ["logits"], "the list of outputs")
        expect(len(answer["outputs"][0]["data"]), tensor.shape[0] * reference["tensor"].shape[1], "data's length")
    with report.check("raw http: nested data; the content type of curl -d"):
        same_bits(logits(request(tensor.tolist()))[0], reference["tensor"], "logits of nested data")
        found, _, _ = logits(request(), {"content-type": "application/x-www-form-urlencoded"})
        same_bits(found, reference["tensor"], "logits")
    with report.check("raw http: a raw request, header length 0"):
        for kind in ("application/octet-stream", "image/png"):
            found, _, _ = logits(png, {header: "0", "content-type": kind})
            same_bits(found, reference["png"], "logits")
        refused(b"not an image", {header: "0"}, (400, 422))
        refused(b"", {header: "0"}, (400, 422))
    with report.check("raw http: binary_data_output, and binary_data that overrules it"):
        body = request(parameters={"binary_data_output": True})
        found, reply_headers, reply = logits(body)
        same_bits(found, reference["tensor"], "logits")
        length = int(reply_headers[header])
        expect(reply[length:], reference["tensor"].astype("<f4").tobytes(), "the answer's tail")
        body["outputs"][0]["parameters"] = {"binary_data": False}
        found, reply_headers, _ = logits(body)
        same_bits(found, reference["tensor"], "logits")
        assert reply_headers.get(header) is None, f"{header} without binary data"
    with report.check("raw http: unknown parameters and null are ignored"):
        body = request(parameters={"colour": "red", "weights": [1, 2], "nothing": None}, id="7", model_name=model)
        body["inputs"][0]["parameters"] = {"colour": "red"}
        body["outputs"][0]["parameters"] = {"colour": "red"}
        found, _, reply = logits(body)
        same_bits(found, reference["tensor"], "logits")
        expect(json.loads(reply)["id"], "7", "the id")
    with report.check("raw http: data that does not fit the shape"):
        for data in (flat[:-1], flat + [0.0], [], [flat, flat], tensor[:, :, 1:].tolist(), "text", 7, None):
            body = request()
            body["inputs"][0]["data"] = data
            refused(body)
        for data in ([*flat[:-1], None], [*flat[:-1], "1"], [*flat[:-1], True], [*flat[:-1], 1e39]):
            refused(request(data))
    with report.check("raw http: binary sizes that do not add up"):
        data = tensor.astype("<f4").tobytes()
        size = len(data)
        body, headers = with_binary(data, size)
        same_bits(logits(body, headers)[0], reference["tensor"], "logits of what is right")
        wrong = [
            with_binary(data[:-4], size), with_binary(data + b"\0\0\0\0", size), with_binary(data, size - 4),
            with_binary(data, size + 4), with_binary(data[:-1], size - 1), with_binary(data, -size),
            with_binary(data, None), with_binary(b"", 0), with_binary(data, str(size)), with_binary(data, 1 << 63),
            with_binary(data, size, length=lambda head: len(head) - 1),
            with_binary(data, size, length=lambda head: len(head) + 1),
            with_binary(data, size, length=lambda head: len(head) + size + 1),
            with_binary(data, size, length=lambda head: -1), with_binary(data, size, length=lambda head: "many"),
            with_binary(data, size, length=lambda head: "9" * 30), with_binary(data, size, form=[2, *shape[1:]]),
            with_binary(data, size, form=[1 << 62, 1 << 62, 4, 4]), (body, {}),
        ]
        for number, (body, headers) in enumerate(wrong):
            try:
                refused(body, headers)
            except AssertionError as error:
                raise AssertionError(f"case {number}: {error}") from None
    with report.check("raw http: BYTES elements that do not add up"):
        element = struct.pack("<I", len(png)) + png
        picture_of = {"name": "image", "datatype": "BYTES"}
        body, headers = with_binary(element * 2, 2 * len(element), form=[2], **picture_of)
        close(logits(body, headers)[0], np.concatenate([reference["png"]] * 2), "logits of two", 1e-4)
        for tail, count in [
            (element, 2), (element * 2, 1), (element[:-1], 1), (element + b"\0\0", 1), (element[:3], 1),
            (struct.pack("<I", 0xFFFFFFFF) + png, 1), (struct.pack(">I", len(png)) + png, 1),
        ]:
            refused(*with_binary(tail, len(tail), form=[count], **picture_of))
    with report.check("raw http: bodies that are no request"):
        bodies = [b"", b"{", b"[]", b"null", b"\xff\xfe", {}, {"inputs": []}, {"inputs": "images"}, {"inputs": [{}]}]
        for body in [*bodies, b'{"inputs":' + b"[" * 100_000]:
            refused(body)
        refused(request(), address=f"{base}/v2/models/nobody/infer", statuses=(404,))
        refused(request(), address=f"{base}/v2/models/{model}/nothing", statuses=(404,))
        refused(request(), address=f"{base}/v2/models/{model}", statuses=(405,))


def check_raw_grpc(report, channel, model, tensor, png, reference):
    """What no client library sends."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def request(name="images", datatype="FP32", shape=tensor.shape, raw=(), **contents):
        message = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
        entry = message.inputs.add(name=name, datatype=datatype, shape=shape)
        for field, values in contents.items():
            getattr(entry.contents, field).extend(values)
        message.outputs.add(name="logits")
        return message

    def logits(message):
        return triton_grpc.InferResult(stub.ModelInfer(message, timeout=30)).as_numpy("logits")

    def refused(message, code=grpc.StatusCode.INVALID_ARGUMENT):
        try:
            stub.ModelInfer(message, timeout=30)
        except grpc.RpcError as error:
            expect(error.code(), code, f"the code, with {error.details()!r},")
            assert error.details(), "the message is empty"
        else:
            raise AssertionError("it was accepted")

    flat, data = tensor.ravel().tolist(), tensor.astype("<f4").tobytes()
    element = struct.pack("<I", len(png)) + png
    picture_of = {"name": "image", "datatype": "BYTES", "shape": [1]}
    with report.check("raw grpc: typed contents"):
        same_bits(logits(request(fp32_contents=flat)), reference["tensor"], "logits of fp32_contents")
        same_bits(logits(request(bytes_contents=[png], **picture_of)), reference["png"], "logits of bytes_contents")
    with report.check("raw grpc: contents that do not add up"):
        same_bits(logits(request(raw=[data])), reference["tensor"], "logits of what is right")
        refused(request(fp32_contents=flat[:-1]))
        refused(request(fp64_contents=flat))
        refused(request(fp32_contents=flat, raw=[data]))
        refused(request(fp32_contents=[*flat[:-1], float("nan")]))
        refused(request(raw=[data, data]))
        refused(request())
        refused(request(raw=[data[:-1]]))
        refused(request(raw=[element * 2], **picture_of))
        refused(request(raw=[struct.pack("<I", 0xFFFFFFFF) + png], **picture_of))
        refused(request(bytes_contents=[png, png], **picture_of))
        refused(service_pb2.ModelInferRequest(model_name=model))
        refused(service_pb2.ModelInferRequest(), grpc.StatusCode.NOT_FOUND)
    with report.check("raw grpc: health"):
        check = channel.unary_unary("/grpc.health.v1.Health/Check", lambda message: message, lambda message: message)
        for service in ("", model):
            name = service.encode()
            # HealthCheckRequest{service = 1}; HealthCheckResponse{status = 1}, where 1 is SERVING.
            answer = check(bytes([0x0A, len(name)]) + name if name else b"", timeout=10)
            expect(answer, b"\x08\x01", f"the health of {service!r}")
        try:
            check(b"\x0a\x06nobody", timeout=10)
        except grpc.RpcError as error:
            expect(error.code(), grpc.StatusCode.NOT_FOUND, "the code for an unknown service")
        else:
            raise AssertionError("an unknown service has a health")


async def check_aio(report, addresses, model, tensor, reference):
    for name, module in [("http", triton_http_aio), ("grpc", triton_grpc_aio)]:
        with report.check(f"{name} aio: ready, infer, an error"):
            async with module.InferenceServerClient(addresses[name]) as client:
                assert await client.is_server_ready() is True
                assert await client.get_model_metadata(model)
                entry = module.InferInput("images", list(tensor.shape), "FP32").set_data_from_numpy(tensor)
                outputs = [module.InferRequestedOutput("logits")]
                results = await asyncio.gather(*(client.infer(model, [entry], outputs=outputs) for _ in range(4)))
                for result in results:
                    close(result.as_numpy("logits"), reference["tensor"], "logits", 1e-4)
                result = await client.infer(model, [entry], outputs=outputs)
                same_bits(result.as_numpy("logits"), reference["tensor"], "logits")
                try:
                    await client.infer("nobody", [entry])
                except InferenceServerException as error:
                    assert error.status() in NOT_FOUND[name], error
                else:
                    raise AssertionError("an unknown model answered")
                index = await client.get_model_repository_index()
                assert index, "the index is empty"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("http", help="host:port of the REST protocol and the native API")
    parser.add_argument("grpc", help="host:port of the gRPC protocol")
    parser.add_argument("--model", default="cifar10-lt")
    args = parser.parse_args()
    report = Report()
    native = Native(f"http://{args.http}", args.model)
    protocols = [Protocol("http", args.http, args.model), Protocol("grpc", args.grpc, args.model)]
    side = native.preprocessing["crop"]
    small = picture(side, side, 1)
    png, jpeg = encoded(small), encoded(picture(320, 240, 2), "JPEG", quality=90)
    tensor = native.normalised(small)
    reference = {}
    with report.check("http: logits of FP32, the reference for all that follows") as figures:
        http = protocols[0]
        reference["png"] = native.classify(png)[0]
        metadata = http.client.get_model_metadata(args.model)
        reference["version"] = metadata["versions"][-1]
        reference["tensor"] = http.infer([http.input("images", tensor)]).as_numpy("logits")
        difference = close(reference["tensor"], reference["png"], "logits of the tensor and its PNG", 1e-3)
        figures.append(f"from the PNG's: {difference:g}")
    if report.failed:
        return report.end()
    for protocol in protocols:
        check_server(report, protocol, native, reference["version"])
        check_inference(report, protocol, native, tensor, png, jpeg, reference)
        check_errors(report, protocol, tensor, png)
        check_statistics(report, protocol, tensor, png, reference["version"])
    check_json(report, protocols[0], tensor, png, reference)
    check_raw_http(report, f"http://{args.http}", args.model, tensor, png, reference)
    with grpc.insecure_channel(args.grpc) as channel:
        check_raw_grpc(report, channel, args.model, tensor, png, reference)
    asyncio.run(check_aio(report, {"http": args.http, "grpc": args.grpc}, args.model, tensor, reference))
    for protocol in protocols:
        check_repository(report, protocol, tensor, reference)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
