"""Holds the server to its own OpenAPI document with schemathesis: generated requests, valid and not, against BASE_URL.

    python contract.py BASE_URL [--seconds 75] [--seed 1]

Left out are two of schemathesis' checks. positive_data_acceptance: a random name, prior or image fits its schema, and
is refused all the same. Checks of security schemes: the server under test has no keys.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
]
# Values that reach further than a random string, where the document allows any.
WORDS = {
    "prior": ["uniform", "train"],
    "set_score": ["posterior", "pas", "plain"],
    "set_rung": ["marginal", "group", "class", "shrunk"],
    "include": ["logits", "uncalibrated,support", "logits,timings"],
}
IMAGES = {"png": "PNG", "jpeg": "JPEG", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("--seconds", type=int, default=75)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    base = args.base_url.rstrip("/")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{base}/openapi.yaml", "--url", base,
        "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--mode", "all",
        "--max-time", str(args.seconds), "--seed", str(args.seed), "--generation-database", "none",
        # What it unloads, it cannot ask; triton.py loads and unloads.
        "--exclude-path-regex", "/(un)?load$", "--request-timeout", "20", "--suppress-health-check", "all", "--continue-on-failure", "--no-color",
    ]
    here = Path(__file__).resolve()
    with urllib.request.urlopen(f"{base}/v1/models", timeout=20) as reply:
        models = json.load(reply)["models"]
    words = {**WORDS, "model": [m["name"] for m in models], "version": [m["version"] for m in models]}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": here.stem, "PYTHONPATH": str(here.parent)}
        environment["NBN_CONTRACT_WORDS"] = json.dumps(words)
        # The time limit is for generating; a run that goes far beyond it hangs.
        return subprocess.run(command, cwd=folder, env=environment, timeout=4 * args.seconds + 60).returncode


def register_hooks():
    """What schemathesis loads this file for: bodies that a schema cannot describe."""
    import schemathesis
    from hypothesis import strategies

    from common import encoded, picture

    def files(kinds):
        whole = [encoded(picture(*size), kind) for kind in kinds for size in ((1, 1), (40, 30), (3, 200))]
        cut = [file[: len(file) // 2] for file in whole]
        return strategies.sampled_from(whole) | strategies.sampled_from(cut) | strategies.binary(max_size=200)

    for subtype, kind in IMAGES.items():
        schemathesis.openapi.media_type(f"image/{subtype}", files([kind]))
    schemathesis.openapi.media_type("application/octet-stream", files(IMAGES.values()))

    words = json.loads(os.environ["NBN_CONTRACT_WORDS"])
    words["b64"] = [base64.b64encode(encoded(picture(30, 40), kind)).decode() for kind in IMAGES.values()]

    def describe_word(name, schema):
        return {"anyOf": [{"enum": words[name]}, schema]} if schema.get("type") == "string" else schema

    @schemathesis.hook
    def before_load_schema(context, raw_schema):
        image = raw_schema["components"]["schemas"]["JsonImage"]["properties"]
        image["b64"] = describe_word("b64", image["b64"])
        for methods in raw_schema["paths"].values():
            for operation in methods.values():
                for parameter in operation.get("parameters", []):
                    if parameter["name"] in words:
                        parameter["schema"] = describe_word(parameter["name"], parameter["schema"])
                for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                    describe_body(kind, body)


def describe_body(kind, body):
    """A body that the document gives as a list of bytes is a file; a multipart body has parts named image."""
    if body.get("schema", {}).get("type") != "array":
        return
    body["schema"] = {"type": "string", "format": "binary"}
    if kind == "multipart/form-data":
        parts = {"type": "array", "items": body["schema"], "minItems": 1, "maxItems": 4}
        body["schema"] = {"type": "object", "properties": {"image": parts}, "required": ["image"]}
        body["schema"]["additionalProperties"] = False
        body["encoding"] = {"image": {"contentType": "image/png"}}


if __name__ == "__main__":
    sys.exit(main())
else:
    register_hooks()
