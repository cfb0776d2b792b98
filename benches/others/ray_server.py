import signal
import sys

import ray
from ray import serve
from starlette.requests import Request

from network import Network


class Classifier:
    def __init__(self):
        self.network = Network()

    async def __call__(self, request: Request):
        return self.network.classify(await request.body())


if __name__ == "__main__":
    port, workers = int(sys.argv[1]), int(sys.argv[2])
    # The proxy and the controller ask for no processor of their own.
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(
        Classifier, num_replicas=workers, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=64
    )
    serve.run(deployment.bind(), route_prefix="/classify")
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()
