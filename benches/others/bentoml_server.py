import base64
import os

import bentoml

from network import Network


@bentoml.service(workers=int(os.environ["WORKERS"]), resources={"cpu": "1"})
class Classifier:
    def __init__(self):
        self.network = Network()

    @bentoml.api
    def classify(self, image: str) -> list[dict]:
        return self.network.classify(base64.b64decode(image))
