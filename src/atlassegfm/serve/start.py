"""The server: a socket on this machine, an address with a token, and what runs behind it."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

import uvicorn

from ..core.errors import InputError
from .app import Desk, make_app
from .guard import Guard
from .protocols import SCANS, has_nninteractive, mount

#: Bytes of chance in a token.
_TOKEN_BYTES = 24
#: Connections at a time, and seconds after which an idle one is closed.
_MOST_CONNECTIONS, _IDLE_SECONDS = 100, 20
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
        # No log of requests: addresses hold the token.
        config = uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            limit_concurrency=_MOST_CONNECTIONS,
        )
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/{token}/"
        announce({"url": url, "monailabel": url, "nninteractive": url.rstrip("/") if has_nninteractive() else None})
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            if desk.cohort is not None:
                desk.cohort.stop(_GRACE_SECONDS)
