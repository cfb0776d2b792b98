"""KServe's own Python SDK against a running server, over REST and gRPC.

    python tests/clients/kserve_sdk.py ADDRESS PICTURE     # needs kserve
"""

import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

MODEL = "cifar10-lt"


def request(picture):
    tensor = InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([picture], dtype=object), binary_data=True)
    return InferRequest(model_name=MODEL, infer_inputs=[tensor])


def outputs(reply):
    return {output.name: output.as_numpy() for output in reply.outputs}


async def main():
    address, path = sys.argv[1:]
    with open(path, "rb") as file:
        picture = file.read()
    rest, url = InferenceRESTClient(RESTConfig(protocol="v2")), f"http://{address}"
    assert await rest.is_server_live(url) is True
    assert await rest.is_server_ready(url) is True
    assert await rest.is_model_ready(url, MODEL) is True
    by_rest = outputs(await rest.infer(url, request(picture), model_name=MODEL))
    grpc = InferenceGRPCClient(url=address)
    assert await grpc.is_server_live() and await grpc.is_server_ready() and await grpc.is_model_ready(MODEL)
    by_grpc = outputs(await grpc.infer(request(picture)))
    for name in ("logits", "probabilities", "set"):
        assert by_rest[name].shape == by_grpc[name].shape == (1, 10), name
        assert np.array_equal(by_rest[name], by_grpc[name]), name
    print("KServe's SDK: live, ready, model and infer, over REST and gRPC: equal")


if __name__ == "__main__":
    asyncio.run(main())
