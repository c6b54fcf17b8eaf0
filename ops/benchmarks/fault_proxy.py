"""An HTTP proxy before an S3 server that injects faults with a seed: what object storage does on a bad day.

    python ops/benchmarks/fault_proxy.py --target http://127.0.0.1:9000 --seed 1 --reset 0.02 --slowdown 0.02

It prints its address, and at its end (SIGINT, SIGTERM) what it injected, as JSON. From Python:

    with FaultProxy("http://127.0.0.1:9000", seed=1, rates=Rates(reset=0.02)) as proxy:
        ...  # requests to proxy.url; what happened is in proxy.injected and proxy.requests

Requests pass as they are, the Host header too, so that signatures hold. Whether a request meets a fault
depends on the seed, on what it asks for and on how often it was asked, not on the order of arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CHUNK_BYTES = 64 << 10
HEAD_BYTES = 1 << 20
ANSWERS = {
    "slowdown": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "error": (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    "expired": (403, "Forbidden", "ExpiredToken", "The provided token has expired."),
}
FAULTS = ("reset", "stall", "truncate", *ANSWERS)
BURSTS = ("slowdown", "expired")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Probabilities a request, 0 to 1. The first three strike in the midst of a body.

    Attributes:
        reset: the connection is reset.
        stall: nothing comes for `stall_seconds`, then the rest.
        truncate: the connection ends as if all had been sent.
        slowdown: 503 SlowDown, to `burst` requests in a row.
        error: 500 InternalError.
        expired: 403 ExpiredToken, to `burst` requests in a row.
    """

    reset: float = 0.0
    stall: float = 0.0
    truncate: float = 0.0
    slowdown: float = 0.0
    error: float = 0.0
    expired: float = 0.0


class Fault(NamedTuple):
    """What a request meets, and where in the body: after so many bytes, or at this share of it, 0 to 1."""

    kind: str
    after: int | None = None
    share: float = 0.0


class Request(NamedTuple):
    """A request that came by, and the fault it met, if any."""

    method: str
    path: str
    range: str | None
    fault: str | None


class Head(NamedTuple):
    """The lines before a body, as they came, and what matters of them. Names are in small letters."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]

    @property
    def length(self) -> int | None:
        return int(self.headers["content-length"]) if "content-length" in self.headers else None


class FaultProxy:
    """The proxy, in a thread of its own from `start` to `stop`, or as a context manager.

    Args:
        target: the server behind, http://HOST:PORT or https://HOST.
        seed: of the faults.
        rates: their probabilities.
        port: where to listen; 0 takes a free one.
        burst: how many requests a burst of SlowDown or ExpiredToken hits.
        stall_seconds: how long a stall lasts.
        writes: whether PUT, POST and DELETE meet faults too; otherwise GET and HEAD alone.

    Attributes:
        rates: may be set at any time.
        holds: tells of a request, by method and path, whether it stalls; may be set at any time. A write is
            passed on first.
        injected: how often each fault was injected.
        requests: all that was asked for, in order of arrival.
        sent: bytes of bodies passed back to clients.
        expired: access keys and session tokens that are answered with ExpiredToken.
    """

    def __init__(
        self,
        target: str,
        *,
        seed: int = 0,
        rates: Rates | None = None,
        port: int = 0,
        burst: int = 5,
        stall_seconds: float = 60.0,
        writes: bool = False,
    ) -> None:
        self._target, self._seed, self._writes = urlsplit(target), seed, writes
        self._burst, self._stall_seconds = burst, stall_seconds
        self.rates = rates or Rates()
        self.holds: Callable[[str, str], bool] = lambda _method, _path: False
        self.port = port
        self.injected: collections.Counter[str] = collections.Counter(dict.fromkeys(FAULTS, 0))
        self.requests: list[Request] = []
        self.sent = 0
        self.expired: set[str] = set()
        self._next: collections.deque[Fault | None] = collections.deque()
        self._asked: collections.Counter[tuple[str, str, str | None]] = collections.Counter()
        self._bursts: collections.Counter[str] = collections.Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="fault-proxy")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to listen, in a new thread."""
        self._thread.start()
        self.resume()

    def stop(self) -> None:
        """Break all connections and end the thread."""
        self.pause()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def pause(self) -> None:
        """Break all connections and refuse new ones: the storage is gone."""
        self._run(self._pause())

    def resume(self) -> None:
        """Listen again, at the same port."""
        self._run(self._listen())

    def plan(self, *faults: str | tuple[str, int] | None) -> None:
        """Have the next requests meet these, one each; `("reset", 1000)` strikes after 1000 bytes."""
        for fault in faults:
            self._next.append(Fault(*fault) if isinstance(fault, tuple) else Fault(fault) if fault else None)

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _pause(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # what is drained has left before a connection breaks
        task = self._loop.create_task(self._serve((reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Streams) -> None:
        """Pass the requests of one connection, until either side closes it or a fault does."""
        behind: Streams | None = None
        try:
            while head := await _read_head(client[0]):
                fault = self._fault_of(head)
                if fault and fault.kind in ANSWERS:
                    await _discard_body(client, head)
                    await _answer(client[1], fault.kind, body=head.first[0] != "HEAD")
                    continue
                if behind is None or behind[0].at_eof():
                    behind = await self._connect()
                if not await self._pass(client, behind, head, fault):
                    return
        except (OSError, asyncio.IncompleteReadError):
            _reset(client[1])
        finally:
            for _, writer in filter(None, (client, behind)):
                writer.close()

    async def _connect(self) -> Streams:
        secure = self._target.scheme == "https"
        host, port = self._target.hostname, self._target.port or (443 if secure else 80)
        return await asyncio.open_connection(host, port, ssl=secure or None, limit=HEAD_BYTES)

    async def _pass(self, client: Streams, behind: Streams, head: Head, fault: Fault | None) -> bool:
        """Pass a request on and its answer back; tell whether the connections can go on."""
        behind[1].write(head.raw)
        if head.headers.get("expect") != "100-continue":
            await _relay(_body(client[0], head), behind[1])
        reply = await _read_head(behind[0])
        if reply and reply.first[1] == "100":
            client[1].write(reply.raw)
            await _relay(_body(client[0], head), behind[1])
            reply = await _read_head(behind[0])
        if reply is None:
            raise ConnectionResetError
        empty = head.first[0] == "HEAD" or reply.first[1] in ("204", "304") or reply.length == 0
        if empty and fault and not await self._strike(client[1], fault.kind):
            return False
        client[1].write(reply.raw)
        await client[1].drain()
        if not empty and not await self._pass_body(client[1], behind[0], reply, fault):
            return False
        return "close" not in (head.headers.get("connection"), reply.headers.get("connection"))

    async def _pass_body(
        self, writer: asyncio.StreamWriter, behind: asyncio.StreamReader, reply: Head, fault: Fault | None
    ) -> bool:
        """Pass a body back, or strike in its midst; tell whether the connection stands."""
        where = 0
        if fault:
            where = int(fault.share * (reply.length or 1)) if fault.after is None else fault.after
        async for chunk in _body(behind, reply, answer=True):
            rest = chunk
            if fault and len(chunk) > where:
                await self._send(writer, chunk[:where])
                if not await self._strike(writer, fault.kind):
                    return False
                rest, fault = chunk[where:], None
            where -= len(chunk)
            await self._send(writer, rest)
        return True

    async def _send(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        self.sent += len(chunk)
        writer.write(chunk)
        await writer.drain()

    async def _strike(self, writer: asyncio.StreamWriter, kind: str) -> bool:
        """Stall, or break the connection; tell whether it stands."""
        if kind == "stall":
            await asyncio.sleep(self._stall_seconds)
        elif kind == "reset":
            _reset(writer)
        return kind == "stall"

    def _fault_of(self, head: Head) -> Fault | None:
        """Choose the fault of a request, and note both."""
        method, path = head.first[:2]
        asked = (method, path, head.headers.get("range"))
        self._asked[asked] += 1
        fault = self._choose(head, random.Random(f"{self._seed} {asked} {self._asked[asked]}"))
        self.requests.append(Request(*asked, fault.kind if fault else None))
        if fault:
            self.injected[fault.kind] += 1
        return fault

    def _choose(self, head: Head, dice: random.Random) -> Fault | None:
        signed, token = (head.headers.get(name, "") for name in ("authorization", "x-amz-security-token"))
        if token in self.expired or any(f"Credential={key}/" in signed for key in self.expired):
            return Fault("expired")
        if self.holds(*head.first[:2]):
            return Fault("stall")
        if head.first[0] not in ("GET", "HEAD") and not self._writes:
            return None
        if self._next:
            return self._next.popleft()
        return self._draw(dice)

    def _draw(self, dice: random.Random) -> Fault | None:
        for kind in BURSTS:
            if self._bursts[kind]:
                self._bursts[kind] -= 1
                return Fault(kind)
        drawn = dice.random()
        for kind in FAULTS:
            drawn -= getattr(self.rates, kind)
            if drawn < 0:
                self._bursts[kind] = self._burst - 1 if kind in BURSTS else 0
                return Fault(kind, share=dice.random())
        return None


async def _read_head(reader: asyncio.StreamReader) -> Head | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = raw.decode("latin-1").strip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Head(raw, first.split(" ", 2), {name.lower(): value.strip() for name, _, value in pairs})


async def _body(reader: asyncio.StreamReader, head: Head, *, answer: bool = False) -> AsyncIterator[bytes]:
    """Yield a body as it is on the wire, the framing of chunks included."""
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
    elif head.length is not None or not answer:
        left = head.length or 0
        while left:
            chunk = await reader.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ConnectionResetError
            left -= len(chunk)
            yield chunk
    else:
        while chunk := await reader.read(CHUNK_BYTES):
            yield chunk


async def _relay(body: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
    async for chunk in body:
        writer.write(chunk)
        await writer.drain()


async def _discard_body(client: Streams, head: Head) -> None:
    if head.headers.get("expect") != "100-continue":
        async for _ in _body(client[0], head):
            pass


async def _answer(writer: asyncio.StreamWriter, fault: str, *, body: bool) -> None:
    """Answer as S3 does; to HEAD without a body."""
    status, phrase, code, message = ANSWERS[fault]
    declaration = '<?xml version="1.0" encoding="UTF-8"?>'
    text = f"{declaration}\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    content = text.encode() if body else b""
    head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}"
    writer.write(f"{head}\r\n\r\n".encode() + content)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, where closing it would send FIN."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rates = Rates(**{fault: getattr(options, fault) for fault in FAULTS})
    proxy = FaultProxy(
        options.target,
        seed=options.seed,
        rates=rates,
        port=options.port,
        burst=options.burst,
        stall_seconds=options.stall_seconds,
        writes=options.writes,
    )
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with proxy:
        print(proxy.url, flush=True)
        signal.sigwait(ends)
    print(json.dumps({"requests": len(proxy.requests), "sent": proxy.sent, "injected": proxy.injected}))
    return 0


def parse(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="the server behind, http://HOST:PORT")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0: any free one")
    parser.add_argument("--seed", type=int, default=0)
    for fault in FAULTS:
        parser.add_argument(f"--{fault}", type=float, default=0.0, metavar="P", help="probability a request")
    parser.add_argument("--burst", type=int, default=5, help="requests of a burst (slowdown, expired)")
    parser.add_argument("--stall-seconds", type=float, default=60.0)
    parser.add_argument("--writes", action="store_true", help="faults for PUT, POST and DELETE, too")
    return parser.parse_args(None if arguments is None else list(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
