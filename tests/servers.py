"""A server on a port of this machine, in a thread, for the clients of other programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from atlassegfm.serve import guard
from atlassegfm.serve.app import Desk, make_app
from atlassegfm.serve.protocols import SCANS, mount
from atlassegfm.serve.start import Place

TOKEN = "secret-token"


def guarded(desk: Desk, origins: frozenset[str] = frozenset()) -> Any:
    """The application as it is served."""
    app = make_app(desk)
    mount(app, desk)
    return guard.Guard(app, TOKEN, frozenset({"localhost"}), origins=origins, scans=SCANS)


@contextmanager
def serving(desk: Desk) -> Iterator[str]:
    """Serve, and give the address with the token."""
    with Place().listen() as listening:
        config = uvicorn.Config(guarded(desk), log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/{TOKEN}/"
        finally:
            server.should_exit = True
            thread.join(20)
