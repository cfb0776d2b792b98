"""Hostile and clumsy clients: while each is at work and after it, normal requests must be answered within two seconds.

    python abuse.py HOST:PORT [--pid PID] [--idle 10000] [--header-timeout 10] [--timeout 30]

--header-timeout and --timeout are the server's own. With --pid the server's memory may grow by 256 MiB at most.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import socket
import struct
import sys
import time

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from common import encoded, picture, rss_mib

PATIENCE = 2  # seconds for a normal request
SLACK = 5  # seconds beyond the server's own time limits
GROWTH = 256  # MiB
CLOSED = (ConnectionError, asyncio.IncompleteReadError)


def post(body, **headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/classify HTTP/1.1\r\nHost: abuse\r\nContent-Type: image/png\r\n{lines}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def read_answer(reader):
    """Status and body of one HTTP/1.1 answer; the connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
    return int(head.split(None, 2)[1]), await reader.readexactly(length)


class Abuse:
    """Where the server is, and what a case finds out."""

    def __init__(self, args):
        self.host, _, self.port = args.target.rpartition(":")
        self.args = args
        small = encoded(picture(32, 32))
        self.small = post(small, Connection="close")
        self.normal = [b"GET /livez HTTP/1.1\r\nHost: abuse\r\nConnection: close\r\n\r\n", self.small]
        self.failed = 0

    async def open(self):
        return await asyncio.open_connection(self.host, int(self.port))

    @contextlib.asynccontextmanager
    async def connection(self):
        reader, writer = await self.open()
        try:
            yield reader, writer
        finally:
            writer.close()

    async def normal_request(self, request):
        async with self.connection() as (reader, writer):
            writer.write(request)
            return await read_answer(reader)

    async def probe(self, seen):
        """One normal request of each kind; what goes wrong goes into `seen`."""
        for request in self.normal:
            began = time.monotonic()
            try:
                status, body = await asyncio.wait_for(self.normal_request(request), PATIENCE)
                if status != 200:
                    seen["wrong"].append(f"status {status}, {body[:100]!r}")
            except TimeoutError:
                seen["wrong"].append(f"no answer within {PATIENCE} s")
            except (OSError, EOFError) as error:
                seen["wrong"].append(repr(error))
            seen["probes"] += 1
            seen["worst"] = max(seen["worst"], time.monotonic() - began)
        seen["peak"] = max(seen["peak"], rss_mib(self.args.pid) or 0)

    async def probe_on(self, seen, enough):
        # Asked to end, not cancelled: in Python 3.11, wait_for can lose a cancellation.
        while not enough.is_set():
            await self.probe(seen)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), 0.25)

    async def case(self, name, work):
        """Runs a case with normal requests beside it, and prints its line."""
        before = rss_mib(self.args.pid)
        seen = {"probes": 0, "worst": 0.0, "wrong": [], "peak": before or 0}
        enough = asyncio.Event()
        probing = asyncio.create_task(self.probe_on(seen, enough))
        began = time.monotonic()
        try:
            figures, error = await work, None
        except Exception as raised:
            figures, error = "", f"{type(raised).__name__}: {raised}"
        seconds = time.monotonic() - began
        enough.set()
        await probing
        await self.probe(seen)
        if seen["wrong"]:
            error = f"{error or ''} {len(seen['wrong'])} of {seen['probes']} normal requests failed: {seen['wrong'][0]}"
        memory = ""
        if before is not None:
            after = rss_mib(self.args.pid)
            memory = f"; RSS {before:.0f}, peak {seen['peak']:.0f}, after {after:.0f} MiB"
            if seen["peak"] - before > GROWTH:
                error = f"{error or ''} memory grew by more than {GROWTH} MiB"
        self.failed += error is not None
        line = f"{'FAIL' if error else 'ok  '} {name}: {error.strip() if error else figures}"
        worst = f"{seen['probes']} normal requests, slowest {seen['worst'] * 1000:.0f} ms"
        print(f"{line}; {seconds:.1f} s; {worst}{memory}", flush=True)

    # The cases.

    async def drip(self, head, limit):
        """Sends `head`, then a byte per second, until the server answers or closes: seconds and status (0: none)."""
        began = time.monotonic()
        async with self.connection() as (reader, writer):
            writer.write(head)
            answer = b""
            while time.monotonic() - began < limit:
                try:
                    data = await asyncio.wait_for(reader.read(4096), 1)
                except TimeoutError:
                    writer.write(b"a")
                    continue
                except ConnectionError:
                    data = b""
                answer += data
                if not data:
                    break
            else:
                raise AssertionError(f"the connection was open for {limit} s")
        return time.monotonic() - began, int(answer.split(None, 2)[1]) if answer else 0

    async def slow(self, head, limit):
        ends = await asyncio.gather(*(self.drip(head, limit + SLACK) for _ in range(200)))
        lives, statuses = [seconds for seconds, _ in ends], [status for _, status in ends]
        assert set(statuses) <= {0, 408}, f"statuses {set(statuses)}"
        of = ", ".join(f"{statuses.count(s)} {s or 'without an answer'}" for s in sorted(set(statuses)))
        return f"200 connections closed after {min(lives):.1f} to {max(lives):.1f} s: {of}"

    async def half_closed(self):
        kept = self.small.replace(b"Connection: close\r\n", b"")
        for request in (self.normal[0], self.small, kept):
            async with self.connection() as (reader, writer):
                writer.write(request)
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(), PATIENCE)
                assert b" 200 " in answer[:20], f"a whole request and shutdown: {answer[:20]}"
        for size in (30, len(kept) - 20):
            async with self.connection() as (reader, writer):
                writer.write(kept[:size])
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    # The server waits 2 s for the rest of a body before it takes the end for the end.
                    answer = await asyncio.wait_for(reader.read(), PATIENCE + 2)
                    assert b" 200 " not in answer[:20], f"half a request and shutdown: {answer[:20]}"
        return "3 whole requests answered, 2 halves refused or closed"

    async def idle(self, count):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        room = hard - 200
        note = "" if count <= room else f" of {count}: the hard limit is {hard} open files"
        count, held, gate = min(count, room), [], asyncio.Semaphore(64)

        async def one():
            async with gate:
                reader, writer = await self.open()
                held.append((reader, writer))
                writer.write(b"GET /livez HTTP/1.1\r\nHost: abuse\r\n\r\n")
                status, _ = await asyncio.wait_for(read_answer(reader), 10)
                assert status == 200, f"status {status}"

        try:
            results = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
            errors = [repr(result) for result in results if result is not None]
            assert not errors, f"{len(errors)} of {count} connections failed: {errors[0]}"
            await asyncio.sleep(3)
            still = sum(not reader.at_eof() for reader, _ in held)
        finally:
            for _, writer in held:
                writer.close()
            await asyncio.sleep(1)
        return f"{count} connections{note}, {still} open after 3 s"

    async def rapid_reset(self, count=20_000):
        done = connections = goaways = 0
        headers = [(":method", "GET"), (":path", "/v1/models"), (":scheme", "http"), (":authority", "abuse")]
        while done < count:
            connections += 1
            began = done
            async with self.connection() as (reader, writer):
                h2c = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
                h2c.initiate_connection()
                with contextlib.suppress(*CLOSED, h2.exceptions.ProtocolError):
                    while done < count:
                        for _ in range(min(50, count - done)):
                            stream = h2c.get_next_available_stream_id()
                            h2c.send_headers(stream, headers, end_stream=True)
                            h2c.reset_stream(stream, error_code=8)
                            done += 1
                        writer.write(h2c.data_to_send())
                        await asyncio.wait_for(writer.drain(), 10)
                        with contextlib.suppress(TimeoutError):
                            data = await asyncio.wait_for(reader.read(1 << 16), 0.001)
                            if not data:
                                break
                            events = h2c.receive_data(data)
                            if any(isinstance(event, h2.events.ConnectionTerminated) for event in events):
                                goaways += 1
                                break
            assert done > began, f"connection {connections} took no stream"
        return f"{done} streams over {connections} connections, {goaways} times GOAWAY"

    async def tiny_chunks(self, count=100_000):
        image = encoded(picture(150, 150), compress_level=0)
        body = image + bytes(count - len(image))
        head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        async with self.connection() as (reader, writer):
            with contextlib.suppress(ConnectionError):
                writer.write(head)
                for start in range(0, count, 1000):
                    writer.write(b"".join(b"1\r\n%c\r\n" % byte for byte in body[start : start + 1000]))
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
            status, _ = await asyncio.wait_for(read_answer(reader), 10)
        assert status == 200 or 400 <= status < 500, f"status {status}"
        return f"{count} chunks, status {status}"

    async def endless_header(self, limit=64 << 20):
        async with self.connection() as (reader, writer):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: abuse\r\nX-Endless: ")
            sent, answer, reading = 0, b"", asyncio.ensure_future(reader.read(4096))
            with contextlib.suppress(ConnectionError):
                while not reading.done() and sent < limit:
                    writer.write(b"a" * 16384)
                    sent += 16384
                    await asyncio.wait_for(writer.drain(), 10)
                    await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):
                answer = await asyncio.wait_for(reading, PATIENCE)
        assert sent < limit, f"{limit >> 20} MiB of header were taken"
        assert not answer or b" 431 " in answer[:20], f"answer {answer[:40]}"
        return f"{'status 431' if answer else 'closed'} after about {sent >> 10} KiB"

    async def long_values(self, size=8 << 20, short=8 << 10):
        """Values of many bytes in a JSON body, which errors quote: the answers stay short."""
        _, models = await self.normal_request(b"GET /v1/models HTTP/1.1\r\nHost: abuse\r\nConnection: close\r\n\r\n")
        v2 = f"/v2/models/{json.loads(models)['models'][0]['name']}/infer"
        long, answers = "x" * size, []
        bodies = [("/v1/classify", {"images": long}), ("/v1/classify", {long: 1}),
                  ("/v1/classify", {"images": [{"b64": "", "id": long}]}),
                  ("/v1/classify", {"images": [], "options": {"prior": {long: 1}, "top_k": long}}),
                  (v2, {"inputs": long}), (v2, {"id": long, "inputs": []})]
        for path, value in bodies:
            body = json.dumps(value).encode()
            request = post(body).replace(b"/v1/classify", path.encode()).replace(b"image/png", b"application/json")
            async with self.connection() as (reader, writer):
                writer.write(request)
                await writer.drain()
                status, answer = await asyncio.wait_for(read_answer(reader), 10)
            assert 400 <= status < 500, f"{path}: status {status}"
            assert len(answer) < short, f"{path}: an answer of {len(answer)} bytes"
            answers.append(len(answer))
        return f"{len(answers)} bodies of {size >> 20} MiB, answers of {min(answers)} to {max(answers)} bytes"

    async def close_at_once(self, count=1000):
        gate, opened = asyncio.Semaphore(256), []
        reset = struct.pack("ii", 1, 0)  # linger for 0 s

        async def one(number):
            async with gate:
                _, writer = await self.open()
                if number % 2:
                    writer.write(self.small[:100])
                if number % 3 == 0:
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                opened.append(writer)

        await asyncio.gather(*(one(number) for number in range(count)))
        for writer in opened:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in opened), return_exceptions=True)
        return f"{count} connections"

    async def run(self):
        """Runs all cases; the exit status."""
        args = self.args
        seen = {"probes": 0, "worst": 0.0, "wrong": [], "peak": 0}
        for _ in range(50):
            await self.probe(seen)
        assert not seen["wrong"], f"the server does not answer normal requests: {seen['wrong'][0]}"
        start = rss_mib(args.pid)
        header = b"GET /livez HTTP/1.1\r\nHost: abuse\r\nX-Slow: "
        body = post(b"").replace(b"Content-Length: 0", b"Content-Length: 100000")
        await self.case("slow headers", self.slow(header, args.header_timeout))
        await self.case("slow bodies", self.slow(body, args.timeout))
        await self.case("half-closed sockets", self.half_closed())
        await self.case("idle connections", self.idle(args.idle))
        await self.case("HTTP/2 rapid reset", self.rapid_reset())
        await self.case("chunks of one byte", self.tiny_chunks())
        await self.case("endless header", self.endless_header())
        await self.case("closing at once", self.close_at_once())
        await self.case("long values", self.long_values())
        if start is not None:
            end = rss_mib(args.pid)
            grown = end - start > GROWTH
            self.failed += grown
            print(f"{'FAIL' if grown else 'ok  '} memory: RSS {start:.0f} MiB at first, {end:.0f} at last")
        print(f"{self.failed} cases failed")
        return 1 if self.failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--pid", type=int, help="the server's process")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections")
    parser.add_argument("--header-timeout", type=float, default=10)
    parser.add_argument("--timeout", type=float, default=30)
    return asyncio.run(Abuse(parser.parse_args()).run())


if __name__ == "__main__":
    sys.exit(main())
