"""Capacity, and what happens beyond it. Prints a JSON line of figures per phase.

    python overload.py BASE_URL --capacity-probe [--seconds 60] [--pid PID]
    python overload.py BASE_URL --capacity 900 --open-loop 0.5,0.8,0.95

Capacity is images per second over 16 connections in a closed loop. Then three times that arrives at fixed intervals
whether answers come or not; or, with --open-loop, these shares of it, one after the other. Latencies count from the
moment a request was due. A request is one JPEG. `goodput_share` is the throughput over the capacity before;
`goodput_share_beside_client` leaves out the processors' time that this client took more than during the measurement of
the capacity, for when it runs on the server's machine. The exit status is 1 when an answer is neither 200 nor 503 with
Retry-After, when a connection breaks, or when /livez fails.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import resource
import sys
import time
import urllib.parse

from common import encoded, picture, rss_mib

CLOSED_LOOP = 16
OVERLOAD = 3


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection that carries one request at a time."""

    def __init__(self):
        self.transport = None
        self.buffer = bytearray()
        self.done = None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        self.finish("connection closed", False)

    def usable(self):
        return not self.transport.is_closing()

    def send(self, request, done):
        """`done` gets the status and whether there is a Retry-After."""
        self.done = done
        self.transport.write(request)

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        field = head.find(b"\r\ncontent-length:")
        length = int(head[field + 17 :].split(b"\r\n", 1)[0]) if field >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        del self.buffer[: end + 4 + length]
        if b"\r\nconnection: close" in head:
            self.transport.close()
        self.finish(int(head[9:12]), b"\r\nretry-after:" in head)

    def finish(self, status, retry_after):
        done, self.done = self.done, None
        if done:
            done(status, retry_after)


class Tally:
    """What came back in a phase of so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.until = seconds, time.monotonic() + seconds
        self.latencies = []
        self.in_time = self.rejected = self.hopeless = 0
        self.other = collections.Counter()

    def add(self, status, retry_after, seconds):
        if status == 200:
            self.latencies.append(seconds)
            self.in_time += time.monotonic() <= self.until
        elif status == 503 and retry_after:
            self.rejected += 1
        else:
            self.hopeless += status == 503
            self.other[str(status)] += 1

    def figures(self):
        """Answers that came after the phase are no throughput; their latencies count."""
        ordered = sorted(self.latencies)
        figures = {"seconds": self.seconds, "ok": len(ordered), "ok_per_s": round(self.in_time / self.seconds, 1)}
        for name, share in [("p50_ms", 0.5), ("p99_ms", 0.99)]:
            figures[name] = round(ordered[int(share * (len(ordered) - 1))] * 1000, 2) if ordered else None
        figures |= {"rejected": self.rejected, "rejected_without_retry_after": self.hopeless, "other": self.other}
        return figures


class Load:
    def __init__(self, args):
        url = urllib.parse.urlsplit(args.base_url)
        self.host, self.port, self.args = url.hostname, url.port or 80, args
        self.failed = False
        size = args.size
        pictures = [encoded(picture(size, size, seed), "JPEG", quality=90) for seed in range(8)]
        start = f"POST /v1/classify HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: image/jpeg\r\nContent-Length: "
        self.requests = [start.encode() + b"%d\r\n\r\n" % len(body) + body for body in pictures]
        self.livez = f"GET /livez HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode()
        self.free, self.opened, self.waiting, self.unsent = [], 0, 0, 0

    async def connect(self):
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, self.host, self.port))[1]

    async def ask(self, connection, request):
        answer = asyncio.get_running_loop().create_future()
        connection.send(request, lambda *result: answer.done() or answer.set_result(result))
        return await answer

    async def closed_loop(self, seconds):
        """As many requests as 16 connections carry."""
        tally = Tally(seconds)

        async def one(number):
            connection = await self.connect()
            while (began := time.monotonic()) < tally.until:
                number += 1
                if not connection.usable():
                    connection = await self.connect()
                result = await self.ask(connection, self.requests[number % len(self.requests)])
                tally.add(*result, time.monotonic() - began)
            connection.transport.close()

        await asyncio.gather(*(one(number) for number in range(CLOSED_LOOP)))
        return tally

    def launch(self, number, due, tally):
        """Sends a request over a free connection, or a new one while there may be more."""
        request = self.requests[number % len(self.requests)]

        def send(connection):
            def done(status, retry_after):
                self.waiting -= 1
                tally.add(status, retry_after, time.monotonic() - due)
                if connection.usable():
                    self.free.append(connection)
                else:
                    self.opened -= 1

            connection.send(request, done)

        async def open_and_send():
            try:
                send(await self.connect())
            except OSError as error:
                self.waiting -= 1
                self.opened -= 1
                tally.add(type(error).__name__, False, 0)

        while self.free:
            connection = self.free.pop()
            if connection.usable():
                self.waiting += 1
                return send(connection)
            self.opened -= 1
        if self.opened >= self.args.connections:
            self.unsent += 1
            return None
        self.opened += 1
        self.waiting += 1
        return asyncio.ensure_future(open_and_send())

    async def open_loop(self, rate, seconds):
        """Requests at fixed intervals, whether answers come or not."""
        tally, total, number, opening = Tally(seconds), int(rate * seconds), 0, set()
        began = time.monotonic()
        while number < total:
            due = min(total, int((time.monotonic() - began) * rate) + 1)
            while number < due:
                if task := self.launch(number, began + number / rate, tally):
                    opening.add(task)
                    task.add_done_callback(opening.discard)
                number += 1
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        until = time.monotonic() + 40
        while self.waiting and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if self.waiting:
            tally.other["no answer"] += self.waiting
            self.waiting = 0
        return tally

    async def watch(self, seen, enough):
        """Asks /livez every 200 ms over a connection of its own each time, and reads the server's memory."""
        # Asked to end, not cancelled: in Python 3.11, wait_for can lose a cancellation.
        while not enough.is_set():
            began = time.monotonic()
            try:
                connection = await self.connect()
                status, _ = await asyncio.wait_for(self.ask(connection, self.livez), 10)
                connection.transport.close()
            except (OSError, TimeoutError) as error:
                status = repr(error)
            if status != 200:
                seen["livez_failed"] = str(status)
            seen["livez_max_ms"] = max(seen["livez_max_ms"], round((time.monotonic() - began) * 1000, 1))
            if self.args.pid:
                seen["rss"].append(rss_mib(self.args.pid))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), 0.2)

    async def phase(self, name, work, **known):
        """Runs one phase and prints its figures."""
        seen = {"livez_max_ms": 0.0, "livez_failed": None, "rss": []}
        enough = asyncio.Event()
        watching = asyncio.create_task(self.watch(seen, enough))
        cpu, self.unsent = time.process_time(), 0
        tally = await work
        enough.set()
        await watching
        figures = {"phase": name, **known, **tally.figures()}
        figures |= {"livez_max_ms": seen["livez_max_ms"], "unsent": self.unsent}
        figures["client_cpu_s"] = round(time.process_time() - cpu, 1)
        if rss := seen["rss"]:
            quarters = [rss[len(rss) * i // 4] for i in range(4)] + [rss[-1]]
            figures["rss_mib"] = {"peak": round(max(rss)), "at_quarters": [round(mib) for mib in quarters]}
        if seen["livez_failed"]:
            figures["livez_failed"] = seen["livez_failed"]
        self.failed |= bool(tally.other or seen["livez_failed"])
        return figures

    async def capacity(self, name):
        """Measures the capacity and prints it."""
        figures = await self.phase(name, self.closed_loop(10), connections=CLOSED_LOOP)
        print(json.dumps(figures), flush=True)
        return figures

    async def run(self):
        """Runs the phases; the exit status."""
        args = self.args
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        await self.closed_loop(2)
        capacity, left = args.capacity, None
        if args.capacity_probe:
            figures = await self.capacity("capacity")
            capacity, left = figures["ok_per_s"], left_by_client(figures)
        shares = [(share, "open-loop") for share in args.open_loop] or [(OVERLOAD, "overload")]
        for share, name in shares:
            rate = share * capacity
            known = {"share": share, "offered_per_s": round(rate, 1)}
            figures = await self.phase(name, self.open_loop(rate, args.seconds), **known)
            goodput = figures["ok_per_s"] / capacity
            figures["goodput_share"] = round(goodput, 3)
            left_now = left_by_client(figures)
            # A client that fills the only processor leaves nothing to compare with.
            if left and left_now > 0:
                figures["goodput_share_beside_client"] = round(goodput * left / left_now, 3)
            print(json.dumps(figures), flush=True)
            await asyncio.sleep(1)
        if args.capacity_probe:
            # Machines change their speed: a share is worth what the capacity before and after have in common.
            await self.capacity("capacity again")
        return 1 if self.failed else 0


def left_by_client(figures):
    """Processors that this process did not take, on average."""
    return len(os.sched_getaffinity(0)) - figures["client_cpu_s"] / figures["seconds"]


def shares(text):
    return [float(share) for share in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    capacity = parser.add_mutually_exclusive_group(required=True)
    capacity.add_argument("--capacity-probe", action="store_true", help="measure the capacity first and last")
    capacity.add_argument("--capacity", type=float, help="images per second, as measured before")
    parser.add_argument("--open-loop", type=shares, default=[], metavar="SHARES", help="such as 0.5,0.8,0.95")
    parser.add_argument("--seconds", type=float, default=60, help="of overload, or of each share")
    parser.add_argument("--size", type=int, default=224, help="width and height of the JPEG")
    parser.add_argument("--connections", type=int, default=2048, help="open at most; beyond them requests are unsent")
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    return asyncio.run(Load(parser.parse_args()).run())


if __name__ == "__main__":
    sys.exit(main())
