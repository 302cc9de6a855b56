"""Download of one file, with errors that say what to do."""

import logging
import os
import shutil
import socket
import ssl
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import InputError, ModelError
from ..core.version import __version__

#: Seconds without a byte until a connection counts as broken: hospital proxies hold files back to scan them.
_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20


class Download:
    """Download of one file with pooch, for which it is the progress bar, too.

    ``page`` is where a user can look at the file, ``target`` where it will lie, in a folder that exists. ``size`` in
    bytes and ``sha256`` are None where not known.
    """

    def __init__(self, url: str, page: str, target: Path, size: int | None, sha256: str | None) -> None:
        self.url, self.target, self.size, self.sha256 = url, target, size, sha256
        self.elsewhere = f"look at {page} in a browser, and put the file at {target}"
        self.answer: Any = None
        self.accepted = False
        self.total = self.done = 0

    def to(self, temporary: Path, on_stage: Callable[[str], None], name: str) -> None:
        """Download to a path and check what arrived; InputError if the disk has no room, ModelError for the rest."""
        import pooch
        import requests

        self.stage, self.on_stage = f"downloading {name}", on_stage
        on_stage(self.stage)
        pooch.get_logger().setLevel(logging.WARNING)
        downloader = pooch.HTTPDownloader(
            progressbar=self,
            chunk_size=_CHUNK_BYTES,
            timeout=_TIMEOUT_S,
            headers={"User-Agent": f"atlassegfm/{__version__}", "Accept-Encoding": "identity"},
            hooks={"response": self._check},
            # The certificates of the system, or of SSL_CERT_FILE, as an institution's proxy needs them.
            verify=os.environ.get("REQUESTS_CA_BUNDLE") or ssl.get_default_verify_paths().cafile or True,
        )
        try:
            pooch.retrieve(self.url, self.sha256, temporary.name, temporary.parent, downloader=downloader)
        except requests.RequestException as error:
            raise self._failure(error) from None
        except ValueError as error:
            found = f"what {self.url} gives is not the published file ({error})"
            advice = "nothing was kept, try again, or without the mirror if there is one"
            raise ModelError(f"{self.target}: {found}; {advice}") from None
        finally:
            if self.answer is not None:
                self.answer.close()  # pooch leaves it open on errors
        if self.size not in (None, arrived := temporary.stat().st_size):
            raise ModelError(f"{self.url}: gave {arrived} bytes, expected {self.size}; {self.elsewhere}")

    def update(self, size: int) -> None:
        """Report progress after a chunk."""
        before, self.done = self.done, min(self.done + size, self.total)
        if self.total and (percent := self.done * 100 // self.total) != before * 100 // self.total:
            self.on_stage(f"{self.stage}: {percent} %, {_megabytes(self.done)} of {_megabytes(self.total)}")

    def reset(self) -> None:
        """Do nothing: pooch calls it at the end."""

    close = reset

    def _check(self, answer: Any, **_: Any) -> None:
        """Refuse an answer that cannot be the file before its body is read."""
        self.answer = answer
        if answer.is_redirect or not answer.ok:
            return
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            found = "gives a web page, not the file, as a network does that wants a login first"
            raise ModelError(f"{self.url}: {found}; log in, or {self.elsewhere}")
        size = int(answer.headers.get("Content-Length", self.size or 0))
        if self.size not in (None, size):
            raise ModelError(f"{self.url}: gives {size} bytes, expected {self.size}; {self.elsewhere}")
        free = shutil.disk_usage(self.target.parent).free
        if size > free:
            found = f"needs {_megabytes(size)}, and {_megabytes(free)} are free there"
            advice = "make room, or choose another folder with --folder, or set ATLASSEGFM_MODELS"
            raise InputError(f"{self.target}: {found}; {advice}")
        self.accepted = True

    def _failure(self, error: Any) -> ModelError:
        """Explain why the file cannot be had."""
        if error.response is not None:
            answer = f"{error.response.status_code} ({error.response.reason})"
            return ModelError(f"{self.url}: the server answered {answer}; try again later, or {self.elsewhere}")
        if self.accepted:
            return ModelError(f"{self.url}: the connection broke off; nothing was kept, try again")
        root: BaseException = error
        while inner := root.__cause__ or root.__context__:
            root = inner
        advice = "check the network and the proxy (HTTPS_PROXY), set HF_ENDPOINT to a mirror"
        if isinstance(root, ssl.SSLError):
            reason = getattr(root, "verify_message", None) or str(root)
            advice = "where a proxy stands between, set SSL_CERT_FILE to its certificates"
        elif isinstance(root, TimeoutError):
            reason = f"no answer within {_TIMEOUT_S:.0f} s"
        elif isinstance(root, socket.gaierror):
            reason = "its name is not known"
        else:
            reason = getattr(root, "strerror", None) or str(root) or type(root).__name__
        return ModelError(
            f"{self.url}: no connection to {urllib.parse.urlsplit(self.url).netloc} ({reason}); {advice}, or download "
            f"the file on another machine and put it at {self.target}"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
