"""An nnInteractive session on a server, by nnInteractive's own client.

The server gets the scan: this is logged each time, and refused for other machines unless the settings allow it. It
answers with masks, not probabilities.
"""

import contextlib
import ipaddress
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ...core.errors import InputError, ModelError
from ...core.extras import require
from ...core.mask import LocalMap
from ...settings import NnInteractiveSettings
from . import Field, NnInteractiveSegmenter, Put

logger = logging.getLogger(__name__)

#: Major version of the server's package whose protocol the client speaks.
_SERVER_MAJOR_VERSION = "2"
_KEY_VARIABLE = "NN_INTERACTIVE_API_KEY"
#: HTTP codes of a server that does not know the request: not found, wrong method, not implemented.
_UNKNOWN_REQUEST = (404, 405, 501)
_REFUSED = (401, 403)
_LONGEST_DETAIL = 300


class _SessionLostError(Exception):
    """The server has ended our session, as it does after ten minutes without a prompt."""


class RemoteSegmenter(NnInteractiveSegmenter):
    """The model by a session on a server, whose ``url`` has no user and password."""

    def __init__(self, url: str, options: NnInteractiveSettings) -> None:
        self._url, self._options = url, options
        self._release: Callable[[], object] = lambda: None
        self._open()

    def close(self) -> None:
        """Release the place on the server."""
        self._release()

    def _probability(self, scan: Field, put: Put) -> LocalMap:
        """0 or 1: servers give no probabilities."""
        for expired in (False, True):
            if expired:  # registering another scan in between may take longer than a server waits
                logger.info("%s: the session had expired; opening another one", self._url)
                self._open()
            with contextlib.suppress(_SessionLostError), self._explained():
                return LocalMap.from_full(self._ask(scan, put))
        ended = "the server ended the session twice within one prompt"
        raise ModelError(f"{self._url}: {ended}; start it with a longer --idle-timeout-seconds")

    def _open(self) -> None:
        """Take a place on the server, and release the one before."""
        self._release()
        self._shown = None
        try:
            with self._explained():
                session = _claim(self._url, self._options.timeout_seconds)
        except (_SessionLostError, KeyError, TypeError, ValueError):
            raise self._other_server() from None
        # A session's heartbeat keeps it alive, so it must end with this object.
        self._release = weakref.finalize(self, session.close)
        version = str(session.INFERENCE_SESSION_VERSION)
        if version.split(".")[0] != _SERVER_MAJOR_VERSION:
            self._release()
            wanted = f"{_SERVER_MAJOR_VERSION}.x: update it"
            raise ModelError(f"{self._url}: the nnInteractive server has version {version}; expected {wanted}")
        with self._explained():
            session.set_do_autozoom(self._options.autozoom)
        self.session = session
        licence = str(session.license)
        self.provenance = {"server": self._url, "server_version": version, "server_weights_licence": licence}

    def _other_server(self) -> ModelError:
        found = f"what answers there is no nnInteractive server of version {_SERVER_MAJOR_VERSION}"
        return ModelError(f"{self._url}: {found}; correct models.nninteractive.server, or update the server")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the client raises into sentences."""
        import httpx
        from nnInteractive.inference.remote import ServerAtCapacityError, SessionExpiredError

        try:
            yield
        except SessionExpiredError:
            raise _SessionLostError from None
        except ServerAtCapacityError as error:
            what = f"the server has no free session ({error}); try later, or start it with a larger --max-sessions"
        except (httpx.ConnectError, httpx.ConnectTimeout):
            what = "no server answers there; start nninteractive-server, or correct models.nninteractive.server"
        except httpx.TimeoutException:
            took = f"{self._options.timeout_seconds:g} s"
            what = f"the server took longer than {took}; raise models.nninteractive.timeout_seconds"
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            if code in _UNKNOWN_REQUEST:
                raise self._other_server() from None
            what = f"the server failed (HTTP {code}: {_detail(error.response)})"
            if code in _REFUSED:
                what = f"the server refuses the key; set {_KEY_VARIABLE} to the one it was started with"
        except httpx.HTTPError as error:
            what = f"the connection to the server broke ({type(error).__name__}); see its log, and try again"
        else:
            return
        raise ModelError(f"{self._url}: {what}") from None


def _claim(url: str, wait_seconds: float) -> Any:
    """Open a session of the client; what it holds is released where it fails."""
    from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

    # A client that fails while it is made leaves its connection open, so it is made in two steps.
    session: Any = object.__new__(nnInteractiveRemoteInferenceSession)
    timeouts = dict.fromkeys(("read_timeout", "set_image_read_timeout", "write_timeout"), wait_seconds)
    try:
        session.__init__(url, **timeouts)
    except BaseException:
        with contextlib.suppress(AttributeError):
            session.close()
        with contextlib.suppress(AttributeError):
            session._http.close()
        raise
    return session


def connect(options: NnInteractiveSettings) -> RemoteSegmenter:
    """Open a session on the server that the settings name.

    Raises InputError if its address is none or not allowed, MissingExtraError if the client is not installed,
    ModelError if the server does not answer, or not as expected.
    """
    url = _checked_address(options)
    require("a server of the model 'nninteractive'", "nninteractive-client", "nnInteractive.inference.remote")
    return RemoteSegmenter(url, options)


def _checked_address(options: NnInteractiveSettings) -> str:
    """Return the server's address; InputError if it is none, or the scan must not be sent there."""
    setting = "models.nninteractive.server"
    try:
        parts = urlsplit(options.server)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    # Checked first, so that no message shows them. Settings are written to run.json, too.
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        key = f"put the key into the environment variable {_KEY_VARIABLE}"
        raise InputError(f"{setting} holds a user, a password or a query; expected http://host:port: {key}")
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{setting} is {options.server!r}; expected an address such as http://127.0.0.1:1527")
    url = options.server.rstrip("/")
    proxied = parts.scheme in getproxies() and not proxy_bypass(host)
    if _is_this_machine(host) and not proxied:
        logger.warning("%s: this server gets the scans: patient data leave this process", url)
        return url
    where = "a proxy (see the environment variable NO_PROXY)" if proxied else "another machine"
    if not options.allow_remote:
        rule = "patient data stay on this machine unless models.nninteractive.allow_remote = true"
        raise InputError(f"{url}: the scans would be sent to {where}; {rule}")
    clear = "" if parts.scheme == "https" else ", unencrypted"
    logger.warning("%s: this server gets the scans: patient data leave this machine%s", url, clear)
    return url


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _detail(response: Any) -> str:
    """The server's explanation, on one line."""
    try:
        said = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        said = response.text
    return " ".join(str(said).split())[:_LONGEST_DETAIL] or "it said nothing"
