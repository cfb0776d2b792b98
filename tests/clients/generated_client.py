"""A client that openapi-python-client made from openapi.yaml posts a picture and reads the answer.

    openapi-python-client generate --path openapi.yaml --output-path FOLDER/generated --meta none
    PYTHONPATH=FOLDER python tests/clients/generated_client.py ADDRESS PICTURE
"""

import base64
import sys

from generated import Client
from generated.api.classify import classify_default
from generated.api.models import models
from generated.models import ClassifyRequest, JsonImage
from generated.types import File


def main():
    address, path = sys.argv[1:]
    client = Client(base_url=f"http://{address}")
    with open(path, "rb") as file:
        picture = file.read()
    with open(path, "rb") as file:
        as_bytes = classify_default.sync(client=client, body=File(payload=file), top_k=3)
    encoded = ClassifyRequest(images=[JsonImage(b64=base64.b64encode(picture).decode())])
    as_json = classify_default.sync(client=client, body=encoded, top_k=3)
    best = as_bytes.results[0].predictions
    assert len(best) == 3 and best[0].label == "ship" and best[0].score > 0.9, best
    assert as_bytes.to_dict()["results"] == as_json.to_dict()["results"]
    assert [model.name for model in models.sync(client=client).models] == ["cifar10-lt"]
    print("the generated client: bytes, JSON and the list of models")


if __name__ == "__main__":
    main()
