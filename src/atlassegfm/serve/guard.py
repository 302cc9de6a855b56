"""Who may send requests: those who know the token, from the page itself, to a name of this machine, within limits."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Bytes of a request's body, and seconds in which it has to arrive.
MOST_BYTES, MOST_SECONDS = 16_000_000, 30.0
#: The same where whole scans are sent.
MOST_SCAN_BYTES, MOST_SCAN_SECONDS = 2_000_000_000, 600.0
#: What a page of an origin that is allowed may send, besides what any may.
_ALLOWED = {
    "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "access-control-allow-headers": "authorization, content-type, x-lease-token, x-meta",
    "access-control-expose-headers": "content-disposition, x-meta",
    "access-control-allow-private-network": "true",
    "access-control-max-age": "600",
}
#: Nothing is loaded from elsewhere, and no other page may show this one.
_POLICY = (
    "default-src 'none'; script-src 'self' blob:; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; font-src data: blob:; worker-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class _RefusedError(Exception):
    """A request that is answered here, with a status and a sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another one, which gets requests below ``/TOKEN/`` as if below ``/``.

    Programs may send the token as a bearer key instead. ``names`` are those of this machine; addresses count as known
    if it is not ``local``, as a foreign page cannot make a browser send them for a name. Pages of ``origins`` may send
    requests too. Paths of ``scans`` take large bodies.
    """

    app: App
    token: str
    names: frozenset[str]
    local: bool = True
    origins: frozenset[str] = frozenset()
    scans: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours opens a web socket
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin", "")
        allowed = (
            {"access-control-allow-origin": origin, "vary": "origin", **_ALLOWED} if origin in self.origins else {}
        )
        answer = _with_headers(send, {**_HEADERS, **allowed})
        try:
            inner = self._admitted(scope, headers)
            if scope["method"] == "OPTIONS" and allowed:  # a browser asks before it sends
                await _reply(answer, 204, b"", [])
                return
            large = inner["path"] in self.scans
            body = await _body(scope, receive, MOST_SCAN_BYTES if large else MOST_BYTES, large)
        except _RefusedError as refused:
            await _refuse(answer, refused)
            return
        await self.app(inner, _replayed(body, receive), answer)

    def _admitted(self, scope: Scope, headers: Mapping[str, str]) -> Scope:
        """Check host, origin and token of a request, and cut the token from its path."""
        host = headers.get("host", "")
        if not self._is_known(host):
            raise _RefusedError(421, "this server does not go by that name")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        elsewhere = site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate"
        if (foreign or elsewhere) and origin not in self.origins:
            raise _RefusedError(403, "requests from other pages are refused")
        if secrets.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self.token}".encode()):
            # A path may hold the token as well.
            path = f"/{scope['path'].removeprefix(f'/{self.token}/').removeprefix('/')}"
            return {**scope, "path": path, "raw_path": path.encode()}
        token, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.token.encode()) or not slash:
            raise _RefusedError(404, "nothing here; use the whole address that the server printed")
        return {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}

    def _is_known(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local


async def _body(scope: Scope, receive: Receive, most_bytes: int, large: bool) -> bytes:
    """Read the body of a request, within the limits."""
    if scope["method"] in ("GET", "HEAD"):
        return b""
    most_seconds = MOST_SCAN_SECONDS if large else MOST_SECONDS
    parts, size, loop = [], 0, asyncio.get_running_loop()
    end = loop.time() + most_seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), end - loop.time())
        except TimeoutError:
            raise _RefusedError(408, f"the request took more than {most_seconds:g} s to arrive") from None
        if message["type"] == "http.disconnect":
            raise _RefusedError(400, "the connection was closed")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most_bytes:
            raise _RefusedError(413, f"the request has more than {most_bytes} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in given]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return answer


async def _refuse(send: Send, refused: _RefusedError) -> None:
    body = json.dumps({"detail": refused.detail}).encode()
    # What is left of the body is not read.
    await _reply(send, refused.status, body, [(b"content-type", b"application/json"), (b"connection", b"close")])


async def _reply(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    sized = headers if status == 204 else [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})
