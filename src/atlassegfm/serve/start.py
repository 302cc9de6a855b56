"""The server: a socket on this machine, an address with a token, and what runs behind it."""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..core.errors import InputError
from .app import Desk, make_app
from .guard import Guard
from .protocols import SCANS, has_nninteractive, mount
from .protocols.ohif import folder_of_ohif

#: Bytes of chance in a token.
_TOKEN_BYTES = 24
#: Connections at a time, and seconds after which an idle one is closed.
_MOST_CONNECTIONS, _IDLE_SECONDS = 100, 20
#: Seconds in which the head of a request has to arrive.
MOST_HEAD_SECONDS = 20.0
#: Seconds that workers of a run have to end when the server does.
_GRACE_SECONDS = 10.0
_LOCAL = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Place:
    """Where the server listens; port 0 takes any that is free. Pages of ``origins`` may send requests too."""

    host: str = "127.0.0.1"
    port: int = 0
    origins: frozenset[str] = frozenset()

    @property
    def is_local(self) -> bool:
        """Whether programs of this machine alone can reach it."""
        return self.host in _LOCAL

    @cached_property
    def names(self) -> frozenset[str]:
        """Names that requests may be sent to."""
        others = () if self.is_local else (self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower())
        return frozenset({"localhost", *others})

    def listen(self) -> socket.socket:
        """Open the socket; InputError if the port is in use, or the host is not one of this machine."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((self.host, self.port))
            found.listen(128)
        except (OSError, OverflowError) as error:
            found.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise InputError(f"--port {self.port}: another program uses it; choose another, or 0 for any") from None
            raise InputError(f"--host {self.host} --port {self.port}: cannot listen there ({error})") from None
        return found


class _Connection(H11Protocol):
    """A connection that is closed when the head of a request is late: uvicorn would wait for ever.

    A hundred such ones, which need no token, would keep everybody else out. Bodies have their limit in the guard.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait on if the head is not complete; what comes after it counts no longer."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        awaited = self.conn.their_state is h11.IDLE
        if self._late is not None and not awaited:
            self._late.cancel()
            self._late = None
        elif self._late is None and awaited:
            self._late = self.loop.call_later(MOST_HEAD_SECONDS, self.transport.abort)


def server_of(guard: Guard) -> uvicorn.Server:
    """Configure the server that answers what the guard lets in."""
    # No log of requests: addresses hold the token.
    config = uvicorn.Config(
        guard,
        http=_Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        limit_concurrency=_MOST_CONNECTIONS,
    )
    return uvicorn.Server(config)


def checked_origin(text: str) -> str:
    """Check the origin of a page, such as http://localhost:3000; InputError if it is none."""
    try:
        parts = urlsplit(text.rstrip("/"))
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or text.rstrip("/") != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc:
        raise InputError(f"--allow-origin {text}: expected the origin of a page, as http://localhost:3000")
    return text.rstrip("/").lower()


def serve(desk: Desk, place: Place, announce: Callable[[dict[str, str | None]], None]) -> None:
    """Answer requests until the process is interrupted.

    ``announce`` gets the addresses once they can be opened: ``url`` of the page, and those that other programs take,
    by protocol; None for a protocol whose package is not installed.
    """
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    with place.listen() as listening:
        host, port = listening.getsockname()[:2]
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
        app = make_app(desk)
        mount(app, desk)
        guard = Guard(app, token, place.names, place.is_local, place.origins, SCANS)
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/{token}/"
        addresses = {"url": url, "monailabel": url, "nninteractive": url.rstrip("/") if has_nninteractive() else None}
        announce({**addresses, "ohif": f"{url}ohif/" if folder_of_ohif() is not None else None})
        try:
            server_of(guard).run(sockets=[listening])
        finally:
            if desk.cohort is not None:
                desk.cohort.stop(_GRACE_SECONDS)
