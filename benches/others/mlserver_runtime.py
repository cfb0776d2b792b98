import json

from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceResponse, ResponseOutput

from network import Network


class Classifier(MLModel):
    async def load(self):
        self.network = Network()
        return True

    async def predict(self, payload):
        encoded = Base64Codec.decode_input(payload.inputs[0])[0]
        data = [json.dumps(self.network.classify(encoded))]
        output = ResponseOutput(name="predictions", shape=[1], datatype="BYTES", data=data)
        return InferenceResponse(model_name=self.name, outputs=[output])
