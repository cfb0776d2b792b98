"""Mixed requests at a steady concurrency for an hour: every answer is checked, and memory must stop growing.

    python soak.py HOST:PORT --pid PID [--admin HOST:PORT] [--seconds 3600] [--concurrency 8] [--pause 0]

Pictures of many sizes and kinds go over the native API (alone, multipart, JSON) and over the Open Inference Protocol
(REST and gRPC, by Triton's client), among wrong requests and clients that go away. The model is loaded anew every
minute, which needs --control, or --admin with the address of the admin listener. The same picture must have the same
best class each time, and every answer the id of its request. At the end it prints counts, and resident memory by
quarter. The exit status is 1 when an answer was lost or is not the expected one, or when the mean of the last quarter
is above the second's by more than a tenth.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import json
import random
import struct
import sys
import time
import zlib

import grpc
import numpy as np
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http.aio as triton_http
from tritonclient.utils import InferenceServerException

from common import encoded, picture, rss_mib

PATIENCE = 60  # seconds for an answer
SAMPLE = 5  # seconds between two looks at the memory
RELOAD = 60  # seconds between two loads of the model
GROWTH = 1.10
SHOWN = 20  # wrong answers that are printed
# Relative difference of the two best scores below which rounding may exchange them.
CLEAR = 0.01


@dataclasses.dataclass
class Sample:
    """An encoded picture and its best class, once that is known."""

    name: str
    kind: str
    data: bytes
    best: int = -1


def png_16(image):
    """RGB with 16 bits, which Pillow cannot write."""
    rows = np.asarray(image).astype(">u2") * 257

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data, 1)) + chunk(b"IEND", b"")


def samples():
    """Pictures from 16×16 to 4000×3000 pixels. Every kind has small ones; some have one that takes long."""
    made = []

    def add(kind, media, width, height, write):
        made.append(Sample(f"{kind}-{width}x{height}", media, write(picture(width, height, len(made)))))

    for width, height in [(16, 16), (32, 32), (97, 61), (224, 224), (640, 480), (1600, 1200), (4000, 3000)]:
        add("jpeg", "jpeg", width, height, lambda image: encoded(image, "JPEG", quality=88))
        add("progressive", "jpeg", width, height, lambda image: encoded(image, "JPEG", progressive=True, quality=80))
    for width, height in [(16, 16), (33, 17), (224, 224), (800, 600), (2000, 1500)]:
        add("png", "png", width, height, lambda image: encoded(image, "PNG", compress_level=1))
        add("png-16", "png", width // 2, height // 2, png_16)
        add("png-grey-16", "png", width, height, lambda image: encoded(image.convert("I;16"), "PNG", compress_level=1))
    for width, height in [(16, 16), (224, 224), (1200, 900)]:
        add("webp", "webp", width, height, lambda image: encoded(image, "WEBP", quality=80, method=0))
        add("webp-lossless", "webp", width, height, lambda image: encoded(image, "WEBP", lossless=True, method=0))
        add("gif", "gif", width, height, lambda image: encoded(image, "GIF"))
        add("bmp", "bmp", width, height, lambda image: encoded(image, "BMP"))
        add("tiff", "tiff", width, height, lambda image: encoded(image, "TIFF"))
        add("tiff-lzw", "tiff", width, height, lambda image: encoded(image, "TIFF", compression="tiff_lzw"))
    return made


class Lost(Exception):
    """No whole answer came."""


class Connection:
    """One HTTP/1.1 connection after another; each is kept for as long as the server keeps it."""

    def __init__(self, address):
        self.host, _, self.port = address.rpartition(":")
        self.streams = None

    async def open(self):
        self.close()
        self.streams = await asyncio.open_connection(self.host, int(self.port))
        return self.streams

    def close(self):
        if self.streams:
            self.streams[1].close()
        self.streams = None

    async def ask(self, method, path, headers=None, body=b"", length=None):
        """Status, headers and body of the answer to a request that says to have `length` bytes."""
        reader, writer = self.streams or await self.open()
        try:
            writer.write(self.head(method, path, headers, len(body) if length is None else length) + body)
            status, found, answer = await asyncio.wait_for(self.read(reader), PATIENCE)
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise Lost(repr(error)) from error
        if found.get("connection") == "close" or length is not None:
            self.close()
        return status, found, answer

    def head(self, method, path, headers, length):
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        return f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\n{lines}content-length: {length}\r\n\r\n".encode()

    @staticmethod
    async def read(reader):
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


def expect(found, wanted, what):
    assert found == wanted, f"{what} is {found!r}, not {wanted!r}"


class Worker:
    """One of the clients that ask at the same time. Each kind of request is a method that raises when its answer is
    wrong and gives what is counted when it is right."""

    def __init__(self, soak, number):
        self.soak, self.args, self.number = soak, soak.args, number
        self.random = random.Random(number)
        self.asked = 0
        self.connection = Connection(self.args.address)
        self.rest = self.grpc = None
        self.path = f"/v1/models/{self.args.model}/classify"
        # How often each kind comes, of all.
        self.kinds = {
            self.alone: 30,
            self.as_json: 10,
            self.as_multipart: 10,
            self.v2_rest: 10,
            self.v2_grpc: 10,
            self.v2_damaged: 2,
            self.damaged: 4,
            self.cut: 4,
            self.empty: 2,
            self.too_large: 2,
            self.too_many_pixels: 2,
            self.wrong_type: 2,
            self.wrong_json: 2,
            self.wrong_option: 2,
            self.wrong_model: 2,
            self.gone_while_sending: 4,
            self.gone_while_waiting: 4,
            self.gone_grpc: 2,
            self.state: 4,
        }

    async def run(self):
        self.rest = triton_http.InferenceServerClient(self.args.address, conn_timeout=PATIENCE)
        self.grpc = triton_grpc.InferenceServerClient(self.args.address)
        kinds, weights = list(self.kinds), list(self.kinds.values())
        while not self.soak.over():
            self.asked += 1
            kind = self.random.choices(kinds, weights)[0]
            name = kind.__name__.replace("_", " ")
            try:
                self.soak.count(name, await kind())
            except (Lost, AssertionError, InferenceServerException, OSError, EOFError, ValueError, KeyError) as error:
                self.connection.close()
                self.soak.wrong(name, error)
            await asyncio.sleep(self.args.pause)
        self.connection.close()
        await self.rest.close()
        await self.grpc.close()

    def id(self):
        return f"soak-{self.number}-{self.asked}"

    def one(self, most=None):
        """Any sample; small ones come more often."""
        fitting = [sample for sample in self.soak.samples if most is None or len(sample.data) <= most]
        return self.random.choices(fitting, [1 / (1 + len(sample.data) / 20_000) for sample in fitting])[0]

    async def post(self, body, media, wanted, query="?top_k=1", path=None, length=None):
        headers = {"content-type": media, "x-request-id": self.id()}
        status, found, answer = await self.connection.ask("POST", (path or self.path) + query, headers, body, length)
        expect(found.get("x-request-id"), self.id(), "the request's id")
        expect(status, wanted, f"the status, with {answer[:200]!r},")
        return json.loads(answer)

    @staticmethod
    def check_result(result, sample):
        expect(result["predictions"][0]["class_id"], sample.best, f"the best class of {sample.name}")

    async def alone(self):
        sample = self.one()
        answer = await self.post(sample.data, f"image/{sample.kind}", 200)
        self.check_result(answer["results"][0], sample)
        return 200

    def several(self):
        """Ids and samples; none for a damaged picture."""
        chosen = [self.one(300_000) for _ in range(self.random.randint(1, 6))]
        if self.random.random() < 0.3:
            chosen.insert(self.random.randrange(len(chosen) + 1), None)
        return [(f"{self.id()}-{n}", sample) for n, sample in enumerate(chosen)]

    def check_several(self, answer, chosen):
        expect([result.get("id") for result in answer["results"]], [name for name, _ in chosen], "the list of ids")
        for result, (_, sample) in zip(answer["results"], chosen):
            if sample:
                self.check_result(result, sample)
            else:
                assert result["error"], "a damaged picture has no error"
        return f"200 with {'a damaged picture' if None in dict(chosen).values() else 'whole pictures'}"

    async def as_json(self):
        chosen = self.several()
        if len(chosen) == 1 and chosen[0][1] is None:
            return "none"
        data = [(name, sample.data if sample else b"\xff\xd8\xff damaged") for name, sample in chosen]
        images = [{"id": name, "b64": base64.b64encode(content).decode()} for name, content in data]
        body = json.dumps({"images": images, "options": {"top_k": 1}}).encode()
        return self.check_several(await self.post(body, "application/json", 200, ""), chosen)

    async def as_multipart(self):
        chosen = self.several()
        body = b""
        for name, sample in chosen:
            body += f'--soak\r\ncontent-disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
            body += (sample.data if sample else b"GIF89a") + b"\r\n"
        answer = await self.post(body + b"--soak--\r\n", "multipart/form-data; boundary=soak", 200)
        return self.check_several(answer, chosen)

    async def damaged(self):
        sample = self.one(1_000_000)
        at = self.random.randrange(len(sample.data))
        # Whatever becomes of it, an answer comes, and it is no failure of the server's.
        data = sample.data[:at] + self.random.randbytes(40) + sample.data[at + 40 :]
        headers = {"content-type": "application/octet-stream"}
        status, _, answer = await self.connection.ask("POST", self.path, headers, data)
        assert status in (200, 422), f"the status is {status}, with {answer[:200]!r}"
        return status

    async def cut(self):
        sample = self.one()
        # Half of such a file may be a whole picture.
        while sample.kind in ("bmp", "gif", "tiff"):
            sample = self.one()
        await self.post(sample.data[: len(sample.data) // 2], f"image/{sample.kind}", 422)
        return 422

    async def empty(self):
        await self.post(b"", "image/png", 400)
        return 400

    async def too_large(self):
        await self.post(b"", "image/png", 413, length=1 << 40)
        return 413

    async def too_many_pixels(self):
        await self.post(self.soak.too_many_pixels, "image/png", 422)
        return 422

    async def wrong_type(self):
        await self.post(b"text", "text/plain", 415)
        return 415

    async def wrong_json(self):
        await self.post(b'{"images": [{"b64": 5}]}', "application/json", 400)
        return 400

    async def wrong_option(self):
        await self.post(self.soak.samples[0].data, "image/jpeg", 400, query="?top_k=0")
        return 400

    async def wrong_model(self):
        await self.post(self.soak.samples[0].data, "image/jpeg", 404, path="/v1/models/nobody/classify")
        return 404

    async def gone_while_sending(self):
        sample = self.one()
        connection = Connection(self.args.address)
        _, writer = await connection.open()
        writer.write(connection.head("POST", self.path, {"content-type": f"image/{sample.kind}"}, len(sample.data)))
        writer.write(sample.data[: self.random.randrange(len(sample.data))])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(self.random.random() * 0.02)
        connection.close()
        return "closed"

    async def gone_while_waiting(self):
        sample = self.one()
        connection = Connection(self.args.address)
        _, writer = await connection.open()
        writer.write(connection.head("POST", self.path, {"content-type": f"image/{sample.kind}"}, len(sample.data)))
        writer.write(sample.data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(self.random.random() * 0.02)
        connection.close()
        return "closed"

    async def gone_grpc(self):
        call = asyncio.ensure_future(self.v2(self.grpc, triton_grpc, [self.one().data]))
        await asyncio.sleep(self.random.random() * 0.02)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, InferenceServerException, grpc.aio.AioRpcError):
            await call
        return "cancelled"

    async def v2(self, client, module, pictures):
        """The best classes of pictures."""
        tensor = module.InferInput("image", [len(pictures)], "BYTES")
        tensor.set_data_from_numpy(np.array(pictures, dtype=object))
        outputs = [module.InferRequestedOutput("probabilities", class_count=1)]
        call = client.infer(self.args.model, [tensor], outputs=outputs, request_id=self.id())
        result = await asyncio.wait_for(call, PATIENCE)
        response = result.get_response()
        expect(response["id"] if isinstance(response, dict) else response.id, self.id(), "the request's id")
        return [int(value.split(b":")[1]) for value in result.as_numpy("probabilities").reshape(-1)]

    async def v2_all(self, client, module):
        chosen = [self.one(1_000_000) for _ in range(self.random.randint(1, 4))]
        found = await self.v2(client, module, [sample.data for sample in chosen])
        expect(found, [sample.best for sample in chosen], f"the best classes of {[sample.name for sample in chosen]}")
        return "ok"

    async def v2_rest(self):
        return await self.v2_all(self.rest, triton_http)

    async def v2_grpc(self):
        return await self.v2_all(self.grpc, triton_grpc)

    async def v2_damaged(self):
        client, module = self.random.choice([(self.rest, triton_http), (self.grpc, triton_grpc)])
        try:
            await self.v2(client, module, [b"\x89PNG\r\n\x1a\n damaged"])
        except InferenceServerException as error:
            assert error.status() in ("422", "StatusCode.INVALID_ARGUMENT"), f"the status is {error.status()}: {error}"
            return error.status()
        raise AssertionError("a damaged picture was answered")

    async def state(self):
        path = self.random.choice(["/livez", "/readyz", "/v1/models", f"/v1/models/{self.args.model}"])
        status, _, _ = await self.connection.ask("GET", path)
        expect(status, 200, f"the status of {path}")
        return 200


class Soak:
    def __init__(self, args):
        self.args = args
        self.samples = samples()
        # One bit a pixel: a few kilobytes.
        self.too_many_pixels = encoded(picture(16, 16).convert("1").resize((7000, 7000)), "PNG")
        self.counts = collections.defaultdict(collections.Counter)
        self.failures = []
        self.memory = []
        self.until = 0.0

    def over(self):
        return time.monotonic() >= self.until

    def count(self, kind, status):
        self.counts[kind][str(status)] += 1

    def wrong(self, kind, error):
        reason = " ".join(str(error).split())
        self.count(kind, "LOST" if isinstance(error, (Lost, OSError, EOFError)) else "WRONG")
        self.failures.append(kind)
        if len(self.failures) <= SHOWN:
            print(f"FAIL {kind}: {type(error).__name__}: {reason[:400]}", flush=True)

    async def learn(self):
        """Asks for the best class of every sample. Those without a clear one are left out."""
        connection, clear = Connection(self.args.address), []
        for sample in self.samples:
            path = f"/v1/models/{self.args.model}/classify?top_k=2"
            headers = {"content-type": f"image/{sample.kind}"}
            status, _, answer = await connection.ask("POST", path, headers, sample.data)
            assert status == 200, f"{sample.name} gets {status}: {answer[:300]!r}"
            first, second = json.loads(answer)["results"][0]["predictions"]
            sample.best = first["class_id"]
            if second["score"] < first["score"] * (1 - CLEAR):
                clear.append(sample)
        connection.close()
        print(f"{len(clear)} of {len(self.samples)} pictures have a clear best class", flush=True)
        self.samples = clear

    async def watch(self):
        began = time.monotonic()
        while not self.over():
            self.memory.append(((time.monotonic() - began) / self.args.seconds, rss_mib(self.args.pid)))
            await asyncio.sleep(min(SAMPLE, max(0.0, self.until - time.monotonic())))

    async def reload(self):
        connection = Connection(self.args.admin or self.args.address)
        while True:
            # Short runs have their loads, too.
            wait = min(RELOAD, self.args.seconds / 6)
            await asyncio.sleep(min(wait, max(0.0, self.until - time.monotonic())))
            if self.over():
                return
            try:
                status, _, answer = await connection.ask("POST", f"/v2/repository/models/{self.args.model}/load")
                expect(status, 200, f"the status, with {answer[:200]!r},")
                self.count("reload", status)
            except (Lost, OSError, AssertionError) as error:
                self.wrong("reload", error)
            # Idle for a minute, it would be closed.
            connection.close()

    async def run(self):
        """Runs for the given time and prints the figures; the exit status."""
        await self.learn()
        self.until = time.monotonic() + self.args.seconds
        workers = [Worker(self, number).run() for number in range(self.args.concurrency)]
        await asyncio.gather(self.watch(), self.reload(), *workers)
        total = sum(sum(statuses.values()) for statuses in self.counts.values())
        print(f"{total} requests in {self.args.seconds} s, {self.args.concurrency} at a time")
        for kind, statuses in sorted(self.counts.items()):
            print(f"  {kind}: " + ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items())))
        print(f"{'FAIL' if self.failures else 'ok  '} answers: {len(self.failures)} lost or wrong")
        return 1 if self.memory_grew() or self.failures else 0

    def memory_grew(self):
        quarters = [[mib for share, mib in self.memory if int(share * 4) == n] for n in range(4)]
        if not all(quarters):
            print(f"FAIL memory: {len(self.memory)} looks at it are too few for four quarters")
            return True
        means = [sum(quarter) / len(quarter) for quarter in quarters]
        for number, (mean, quarter) in enumerate(zip(means, quarters), 1):
            print(f"  resident memory, quarter {number}: mean {mean:.0f} MiB, most {max(quarter):.0f} MiB")
        ratio = means[3] / means[1]
        grew = ratio > GROWTH
        verdict = "FAIL" if grew else "ok  "
        print(f"{verdict} memory: the last quarter's mean is {ratio:.3f} of the second's, at most {GROWTH}")
        return grew


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--admin", metavar="HOST:PORT", help="the admin listener, where there is one")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0, help="seconds that each waits between two requests")
    parser.add_argument("--model", default="cifar10-lt")
    return asyncio.run(Soak(parser.parse_args()).run())


if __name__ == "__main__":
    sys.exit(main())
