"""Listen at an address, serve until a signal, and let running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rwkv_npu.errors import UsageError
from rwkv_npu.serve.app import application
from rwkv_npu.serve.service import Service
from rwkv_npu.serve.web import LOOPBACK, PATIENCE_S

CONNECTIONS = 256
HEADER_S = 20  # seconds for the request line and the headers


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose headers do not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEADER_S, self._hang_up)

    def _hang_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server. At the first signal it tells the scheduler to accept no more jobs."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service, self._stopping = service, asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Wait for the signal to stop, and let uvicorn renew the Date header once a second.

        uvicorn's own loop wakes ten times a second, which costs CPU time on an idle board.
        """
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1.0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.scheduler.refuse()
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises UsageError if the address is taken or not on this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on {host}:{port} ({reason}): give another port= or host=") from None
    bound.set_inheritable(True)
    return bound


def serve(service: Service, bound: socket.socket, *, key: str | None, verbose: bool) -> None:
    """Serve until SIGINT or SIGTERM. Running answers then have PATIENCE_S to finish."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("rwkv_npu.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    local = bound.getsockname()[0] in ("127.0.0.1", "::1")
    config = uvicorn.Config(
        application(service, key=key, hosts=LOOPBACK if local else None),
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=PATIENCE_S,
        server_header=False,
    )
    # After its shutdown uvicorn raises the signal again. An empty handler keeps it from ending the process.
    restored = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config, service).run(sockets=[bound])
    finally:
        for number, before in restored.items():
            signal.signal(number, before)
