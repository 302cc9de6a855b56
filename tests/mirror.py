"""A mirror of Hugging Face in this process, that can also misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from atlassegfm.models.weights import PublishedWeights, WeightsFile

REVISION = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "somebody/weights"


class Mirror:
    """Files by the path of their address, and answers of another kind by the same path."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []

    def publish(self, path: str, content: bytes, revision: str = REVISION) -> None:
        self.files[self.path_of(path, revision)] = content

    def answer(self, path: str, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.answers[self.path_of(path)] = answer

    def url_of(self, path: str) -> str:
        return self.address + self.path_of(path)

    @staticmethod
    def path_of(path: str, revision: str = REVISION) -> str:
        return f"/{REPOSITORY}/resolve/{revision}/{path}"


def status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that is a number."""
    return lambda handler: handler.send_error(code)


def body(
    content: bytes, *, promised: int | None = None, kind: str = "application/octet-stream"
) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer with its length as promised, whatever it is; none is promised where that is -1."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        if promised != -1:
            handler.send_header("Content-Length", str(len(content) if promised is None else promised))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@contextmanager
def serving() -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.asked.append(self.path)
            if self.path in mirror.answers:
                mirror.answers[self.path](self)
            elif self.path in mirror.files:
                body(mirror.files[self.path])(self)
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    mirror = Mirror(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def weights(*files: WeightsFile, non_commercial: bool = False, revision: str = REVISION) -> PublishedWeights:
    """Weights on the mirror; one file of which nothing is known if none is named."""
    return PublishedWeights(
        repository=REPOSITORY,
        revision=revision,
        files=files or (WeightsFile("toy.pt"),),
        licence="CC-BY-NC-4.0" if non_commercial else "CC0-1.0",
        licence_url="https://example.org/licence",
        non_commercial=non_commercial,
    )
