"""Weights: where they are looked for, how they are fetched, and what their licence asks for."""

from __future__ import annotations

import hashlib
import http.client
import json
import pickle
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.models import download
from atlassegfm.models import weights as weights_module
from atlassegfm.models.checkpoint import UnsafeCheckpointError, check_fit, load_state, named_weights
from atlassegfm.models.weights import (
    ACCEPTANCE,
    RECORD,
    PublishedWeights,
    WeightsFile,
    accept_licence,
    examine,
    fetch,
    find_weights,
    folders_of,
    licence_accepted,
    weights_folder,
)
from mirror import REVISION, Mirror, body, serving, status, weights

CONTENT = b"not really weights\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
KNOWN = WeightsFile("toy.pt", len(CONTENT), SHA256)
TWO = (WeightsFile("toy/plan.json"), WeightsFile("toy/fold_0/final.pth", 4))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing in the home folder, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ATLASSEGFM_MODELS", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with serving() as one:
        monkeypatch.setenv("HF_ENDPOINT", one.address)
        one.publish("toy.pt", CONTENT)
        yield one


@pytest.fixture
def default(home: Path) -> Path:
    """Where the weights of the model "toy" are looked for last."""
    return home / ".local/share/atlassegfm/models/toy"


def put(folder: Path, *files: WeightsFile) -> Path:
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(CONTENT[: len(CONTENT) if file.size is None else file.size])
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@contextmanager
def raises(kind: type[Exception], *facts: object) -> Iterator[None]:
    """An error whose message holds these facts."""
    with pytest.raises(kind) as caught:
        yield
    for fact in facts:
        assert str(fact) in str(caught.value)


# Where they are looked for


def test_folder_of_all_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = home / ".local/share/atlassegfm/models"
    assert weights_folder() == default
    assert folders_of("toy") == (default / "toy",)
    monkeypatch.setenv("ATLASSEGFM_MODELS", "~/elsewhere")
    assert weights_folder() == home / "elsewhere"
    assert folders_of("toy") == (home / "elsewhere/toy", default / "toy")
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(default))
    assert folders_of("toy") == (default / "toy",)


def test_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="the home folder of this user is not known; set ATLASSEGFM_MODELS to"):
        weights_folder()
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path))
    assert folders_of("toy") == (tmp_path / "toy",)


def test_order_of_the_search(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = weights(KNOWN)
    put(default, KNOWN)
    assert find_weights("toy", published, None) == default / "toy.pt"
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path / "all"))
    assert find_weights("toy", published, None) == default / "toy.pt"
    put(tmp_path / "all/toy", KNOWN)
    assert find_weights("toy", published, None) == tmp_path / "all/toy/toy.pt"
    own = put(tmp_path / "own", WeightsFile("mine.bin", 3)) / "mine.bin"
    assert find_weights("toy", published, own) == own


def test_what_is_complete_goes_before_what_is_not(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path))
    put(tmp_path / "toy", TWO[0])
    put(default, *TWO)
    assert find_weights("toy", weights(*TWO), None) == default
    put(tmp_path / "toy", TWO[1])
    assert find_weights("toy", weights(*TWO), None) == tmp_path / "toy"


def test_a_given_folder_holds_the_published_files(tmp_path: Path) -> None:
    put(tmp_path, KNOWN)
    assert find_weights("toy", weights(KNOWN), tmp_path) == tmp_path / "toy.pt"
    # Other weights of the same kind may lie there: what is in a folder of several files is for the model to check.
    assert find_weights("toy", weights(*TWO), tmp_path) == tmp_path


def test_a_given_path_that_is_not_it(tmp_path: Path, default: Path) -> None:
    put(default, KNOWN, *TWO)
    one = "the weights of the model 'toy' (toy.pt of somebody/weights)"
    two = "the weights of the model 'toy' (toy/plan.json, toy/fold_0/final.pth of somebody/weights)"
    absent = tmp_path / "absent"
    with raises(InputError, f"{absent}: no such file or folder; expected {one}"):
        find_weights("toy", weights(KNOWN), absent)
    (tmp_path / "empty").mkdir()
    with raises(
        InputError,
        f"{tmp_path / 'empty'}: has no toy.pt; expected {one}: name the file itself if it is called otherwise",
    ):
        find_weights("toy", weights(KNOWN), tmp_path / "empty")
    with raises(InputError, f"{default / 'toy.pt'}: is a file; expected the folder of {two}"):
        find_weights("toy", weights(*TWO), default / "toy.pt")


def test_nothing_is_downloaded_unasked(mirror: Mirror, default: Path) -> None:
    with raises(
        InputError,
        f"{default}: no weights of the model 'toy'; nothing is downloaded unasked: run atlassegfm models fetch toy, or "
        f"put {default}/toy.pt there from {mirror.address}/somebody/weights/resolve/{REVISION}/toy.pt "
        "(licence: CC0-1.0, https://example.org/licence)",
    ):
        find_weights("toy", weights(KNOWN), None)
    assert mirror.asked == []


def test_the_address_is_that_of_hugging_face(default: Path) -> None:
    with pytest.raises(InputError, match=f"from https://huggingface.co/somebody/weights/resolve/{REVISION}/toy.pt "):
        find_weights("toy", weights(KNOWN), None)


def test_what_is_missing_is_named(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"https://huggingface.co/somebody/weights/tree/{REVISION}"
    licence = "(licence: CC0-1.0, https://example.org/licence)"
    ask = "nothing is downloaded unasked: run atlassegfm models fetch toy, or put"
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path))
    folder = tmp_path / "toy"
    with raises(
        InputError,
        f"{folder}: no weights of the model 'toy' there, nor in {default}; {ask} {folder}/toy/plan.json, "
        f"{folder}/toy/fold_0/final.pth there from {page} {licence}",
    ):
        find_weights("toy", weights(*TWO), None)
    put(default, TWO[0])
    with pytest.raises(InputError, match=f"put {default}/toy/fold_0/final.pth there from {page}"):
        find_weights("toy", weights(*TWO), None)
    (default / "toy/fold_0").mkdir()
    (default / "toy/fold_0/final.pth").write_bytes(b"abc")
    with raises(
        InputError,
        f"{default}: toy/fold_0/final.pth has 3 bytes, expected 4 (weights of your own are named with --model-path); "
        f"{ask} {default}/toy/fold_0/final.pth there from {page} {licence}",
    ):
        find_weights("toy", weights(*TWO), None)


# Fetching


def test_fetch(mirror: Mirror, default: Path) -> None:
    told: list[str] = []
    fetched = fetch("toy", weights(KNOWN), None, told.append)
    assert (fetched.folder, fetched.downloaded) == (default, ("toy.pt",))
    assert [(one.size, one.sha256, one.verdict) for one in fetched.files] == [(len(CONTENT), SHA256, "as published")]
    assert (default / "toy.pt").read_bytes() == CONTENT
    assert files_in(default) == {"toy.pt", RECORD}
    assert told[0] == "downloading toy.pt"
    assert told[-1] == "downloading toy.pt: 100 %, 0.0 MB of 0.0 MB"
    record = json.loads((default / RECORD).read_text())
    date = record["files"]["toy.pt"].pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert record.pop("atlassegfm")
    assert record == {
        "model": "toy",
        "repository": "somebody/weights",
        "licence": "CC0-1.0",
        "licence_url": "https://example.org/licence",
        "files": {
            "toy.pt": {
                "url": mirror.url_of("toy.pt"),
                "revision": REVISION,
                "size": len(CONTENT),
                "sha256": SHA256,
            }
        },
    }
    assert find_weights("toy", weights(KNOWN), None) == default / "toy.pt"


def test_what_is_there_is_not_fetched_again(mirror: Mirror, default: Path) -> None:
    for file in TWO:
        mirror.publish(file.path, CONTENT[:4])
    put(default, TWO[0])
    fetched = fetch("toy", weights(*TWO))
    assert fetched.downloaded == ("toy/fold_0/final.pth",)
    assert [one.verdict for one in fetched.files] == ["not known", "as fetched"]
    assert (default / TWO[0].path).read_bytes() == CONTENT  # the user's own
    assert mirror.asked == [mirror.path_of("toy/fold_0/final.pth")]
    again = fetch("toy", weights(*TWO))
    assert again.downloaded == ()
    assert len(mirror.asked) == 1


def test_fetch_into_another_folder(mirror: Mirror, default: Path, tmp_path: Path) -> None:
    fetched = fetch("toy", weights(), tmp_path / "deep/down")
    assert fetched.folder == tmp_path / "deep/down"
    assert files_in(tmp_path / "deep/down") == {"toy.pt", RECORD}
    assert not default.exists()
    assert find_weights("toy", weights(), tmp_path / "deep/down") == tmp_path / "deep/down/toy.pt"


def test_fetch_goes_where_the_variable_says(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path / "all"))
    assert fetch("toy", weights()).folder == tmp_path / "all/toy"


def test_redirections_are_followed(mirror: Mirror, default: Path) -> None:
    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "/storage/toy")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    mirror.answer("toy.pt", redirect)
    mirror.files["/storage/toy"] = CONTENT
    assert fetch("toy", weights(KNOWN)).files[0].verdict == "as published"


def test_a_length_need_not_be_promised(mirror: Mirror, default: Path) -> None:
    mirror.answer("toy.pt", body(CONTENT, promised=-1))
    told: list[str] = []
    assert fetch("toy", weights(), None, told.append).files[0].sha256 == SHA256
    assert told == ["downloading toy.pt"]


def test_names_and_revisions_are_quoted(mirror: Mirror, default: Path) -> None:
    file = WeightsFile("final model.pt")
    mirror.files["/somebody/weights/resolve/refs%2Fpr%2F1/final%20model.pt"] = CONTENT
    assert fetch("toy", weights(file, revision="refs/pr/1")).downloaded == ("final model.pt",)


def stall(handler: BaseHTTPRequestHandler) -> None:
    """A part, and then nothing for longer than anybody waits."""
    body(CONTENT[:100], promised=len(CONTENT))(handler)
    handler.wfile.flush()
    threading.Event().wait(0.6)


Answer = Callable[[BaseHTTPRequestHandler], None]


PLACES = ("{url}", "{target}")


@pytest.mark.parametrize(
    ("file", "answer", "facts"),
    [
        (KNOWN, body(CONTENT[:-1] + b"?"), (*PLACES, hashlib.sha256(CONTENT[:-1] + b"?").hexdigest(), SHA256)),
        (KNOWN, body(CONTENT[:-1]), (*PLACES, "{page}", f"{len(CONTENT) - 1} bytes, expected {len(CONTENT)}")),
        (KNOWN, body(CONTENT[:500], promised=len(CONTENT)), ("{url}", "broke off")),
        (WeightsFile("toy.pt"), body(CONTENT[:500], promised=len(CONTENT)), ("{url}", "broke off")),
        (WeightsFile("toy.pt", len(CONTENT)), body(CONTENT[:500], promised=-1), ("{url}", "500", str(len(CONTENT)))),
        (KNOWN, body(CONTENT[:500], promised=-1), (*PLACES, SHA256)),
        (KNOWN, stall, ("{url}", "broke off")),
        (
            WeightsFile("toy.pt"),
            body(b"<html>Please log in", kind="text/html; charset=utf-8"),
            (*PLACES, "{page}", "web page"),
        ),
        *((KNOWN, status(code), (*PLACES, "{page}", str(code))) for code in (401, 403, 404, 503)),
    ],
)
def test_bad_download_is_not_kept(
    mirror: Mirror,
    default: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: WeightsFile,
    answer: Answer,
    facts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.2)
    mirror.answer("toy.pt", answer)
    page = f"{mirror.address}/somebody/weights/tree/{REVISION}"
    places = {"url": mirror.url_of("toy.pt"), "target": default / "toy.pt", "page": page}
    with raises(ModelError, *(fact.format(**places) for fact in facts)):
        fetch("toy", weights(file))
    assert list(default.iterdir()) == []
    del mirror.answers[mirror.path_of("toy.pt")]
    assert fetch("toy", weights(file)).downloaded == ("toy.pt",)


def test_server_hangs_up(mirror: Mirror, default: Path) -> None:
    mirror.answer("toy.pt", lambda handler: handler.connection.shutdown(socket.SHUT_RDWR))
    with raises(ModelError, f"no connection to {mirror.address.removeprefix('http://')}", "Remote end closed"):
        fetch("toy", weights(KNOWN))


def test_no_connection(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/somebody/weights/resolve/{REVISION}/toy.pt"
    with raises(ModelError, url, "Connection refused", "HTTPS_PROXY", "HF_ENDPOINT", default / "toy.pt"):
        fetch("toy", weights(KNOWN))
    assert list(default.iterdir()) == []


UNTRUSTED = ssl.SSLCertVerificationError(1, "certificate verify failed")
UNTRUSTED.verify_message = "self-signed certificate"


@pytest.mark.parametrize(
    ("cause", "facts"),
    [
        (socket.gaierror(-2, "Name or service not known"), ["(its name is not known)"]),
        (TimeoutError("timed out"), ["(no answer within 60 s)"]),
        (http.client.BadStatusLine("?"), ["(?)"]),
        (UNTRUSTED, ["(self-signed certificate)", "SSL_CERT_FILE"]),
    ],
)
def test_reason_of_a_failed_connection(
    default: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, facts: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise requests.ConnectionError("Max retries exceeded") from cause

    monkeypatch.setattr(requests, "get", fail)
    with raises(ModelError, "no connection to huggingface.co", default / "toy.pt", *facts):
        fetch("toy", weights(KNOWN))


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc", "http://", "http://[half"])
def test_mirror_that_is_no_address(default: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with raises(InputError, f"HF_ENDPOINT is {endpoint!r}"):
        fetch("toy", weights(KNOWN))


# A shell that runs the tests in the background has its children ignore interrupts.
FETCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {paths!r}
from mirror import weights
from atlassegfm.models.weights import WeightsFile, fetch
print("ready", flush=True)
fetch("toy", weights(), None, lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_ended_leaves_nothing_under_its_name(
    mirror: Mirror, default: Path, number: signal.Signals
) -> None:
    waiting = threading.Event()

    def half(handler: BaseHTTPRequestHandler) -> None:
        # More than is read in one go, so that a part is written.
        body(bytes(3 << 20), promised=4 << 20)(handler)
        waiting.wait(30)

    mirror.answer("toy.pt", half)
    paths = [str(Path(__file__).parent), str(Path(weights_module.__file__).parents[2])]
    with subprocess.Popen(
        [sys.executable, "-c", FETCH.format(paths=paths)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "%" in line:
                break
        process.send_signal(number)
        process.wait(30)
    waiting.set()
    assert not (default / "toy.pt").exists()
    assert not (default / RECORD).exists()
    left = [path.name for path in default.iterdir()]
    # A killed process cannot clean up; what it leaves does not pass for weights.
    assert left == [] if number == signal.SIGINT else all(name.startswith(".writing-") for name in left)
    del mirror.answers[mirror.path_of("toy.pt")]
    assert fetch("toy", weights()).files[0].sha256 == SHA256


def test_a_disk_that_is_full(mirror: Mirror, default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with raises(
        InputError,
        f"{default}/toy.pt: needs 0.0 MB, and 0.0 MB are free there; make room, or choose another folder with "
        "--folder, or set ATLASSEGFM_MODELS",
    ):
        fetch("toy", weights(KNOWN))
    assert list(default.iterdir()) == []


def test_a_disk_that_fills_up(mirror: Mirror, default: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with raises(InputError, f"{default}/toy.pt: cannot write there (File too large); choose another place"):
            fetch("toy", weights(KNOWN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(default.iterdir()) == []


def test_something_in_the_way(mirror: Mirror, default: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(
        InputError,
        f"{tmp_path}/file/deep: cannot be made (Not a directory); choose another folder with --folder, or set "
        "ATLASSEGFM_MODELS",
    ):
        fetch("toy", weights(), tmp_path / "file/deep")
    (default / "toy.pt").mkdir(parents=True)
    with raises(InputError, f"{default}/toy.pt: is not a file, but the weights are to lie there; move it away"):
        fetch("toy", weights())
    assert mirror.asked == []


def test_another_file_in_the_way_is_not_replaced(mirror: Mirror, default: Path) -> None:
    put(default, WeightsFile("toy.pt", 5))
    before = (default / "toy.pt").read_bytes()
    with raises(
        InputError,
        f"{default}/toy.pt: not the file to fetch: its size is 5, expected {len(CONTENT)}; move it "
        "away, then fetch again",
    ):
        fetch("toy", weights(KNOWN))
    changed = CONTENT[:-1] + b"?"
    (default / "toy.pt").write_bytes(changed)
    with raises(
        InputError,
        f"{default}/toy.pt: not the file to fetch: its sha256 is "
        f"{hashlib.sha256(changed).hexdigest()}, expected {SHA256}; move it away, then fetch again",
    ):
        fetch("toy", weights(KNOWN))
    assert mirror.asked == []
    assert before == CONTENT[:5]


def test_what_was_fetched_is_checked_later(mirror: Mirror, default: Path) -> None:
    assert examine(weights(), default)[0].verdict == "missing"
    fetch("toy", weights())
    assert examine(weights(), default)[0].verdict == "as fetched"
    (default / "toy.pt").write_bytes(CONTENT[:-1] + b"?")
    found = examine(weights(), default)[0]
    assert (found.verdict, found.expected) == ("wrong sha256", SHA256)
    (default / "toy.pt").write_bytes(CONTENT[:-1])
    found = examine(weights(), default)[0]
    assert (found.verdict, found.expected, found.sha256) == ("wrong size", str(len(CONTENT)), None)
    (default / RECORD).unlink()
    assert examine(weights(), default)[0].verdict == "not known"


def test_weights_of_an_earlier_revision_are_fetched_anew(mirror: Mirror, default: Path) -> None:
    mirror.publish("toy.pt", b"old", revision="old")
    fetch("toy", weights(WeightsFile("toy.pt", 3), revision="old"))
    assert examine(weights(KNOWN), default)[0].verdict == "of another revision"
    fetched = fetch("toy", weights(KNOWN))
    assert (fetched.downloaded, fetched.files[0].verdict) == (("toy.pt",), "as published")
    # One that was changed since is the user's.
    (default / "toy.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match=f"its sha256 is {hashlib.sha256(b'mine').hexdigest()}, expected {SHA256}; "):
        fetch("toy", weights(WeightsFile("toy.pt"), revision="new"))


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"toy.pt": {}}}', '{"files": []}', "\udcff"])
def test_a_damaged_record(default: Path, text: str) -> None:
    put(default, KNOWN)
    (default / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    with raises(InputError, f"{default}/{RECORD}: is damaged; delete it, then fetch the weights again"):
        examine(weights(), default)
    assert find_weights("toy", weights(), None) == default / "toy.pt"  # loading needs no record


def test_changed_weights_are_not_loaded(default: Path) -> None:
    put(default, KNOWN)
    changed = CONTENT[:-1] + b"?"
    (default / "toy.pt").write_bytes(changed)
    other = hashlib.sha256(changed).hexdigest()
    with raises(
        InputError,
        f"{default}/toy.pt: is not the published file: its sha256 is {other}, expected {SHA256}; move it away and run "
        "atlassegfm models fetch toy (weights of your own are named with --model-path)",
    ):
        find_weights("toy", weights(KNOWN), None)


@pytest.mark.parametrize("given", ["own", "own/toy", "own/toy/fold_0"])
def test_weights_of_ones_own_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str) -> None:
    plan, final = TWO
    place = put(tmp_path / "own", *TWO) / final.path
    known = replace(final, sha256=hashlib.sha256(CONTENT[:4]).hexdigest())
    assert find_weights("toy", weights(plan, known), tmp_path / given) == tmp_path / given
    assert caplog.messages == []
    place.write_bytes(b"tuned further")
    assert find_weights("toy", weights(plan, known), tmp_path / given) == tmp_path / given
    assert caplog.messages == [f"{place}: is not the published file of the model 'toy'; taken for weights of your own"]


def test_weights_are_hashed_once(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    put(default, KNOWN)
    monkeypatch.setattr("atlassegfm.models.weights.sha256_of", lambda path: hashed.append(path) or SHA256)
    for _ in range(3):
        find_weights("toy", weights(KNOWN), None)
    assert hashed == [default / "toy.pt"]


# Licences

NON_COMMERCIAL = weights(KNOWN, non_commercial=True)


def test_a_licence_must_be_accepted_before_fetching(mirror: Mirror, default: Path) -> None:
    with raises(
        InputError,
        default,
        "CC-BY-NC-4.0, https://example.org/licence",
        "--accept-licence",
    ):
        fetch("toy", NON_COMMERCIAL)
    assert mirror.asked == []
    accept_licence("toy", NON_COMMERCIAL)
    assert fetch("toy", NON_COMMERCIAL).downloaded == ("toy.pt",)


def test_a_licence_must_be_accepted_before_loading(default: Path, tmp_path: Path) -> None:
    own = put(tmp_path / "own", WeightsFile("mine.pt", 3)) / "mine.pt"
    put(default, KNOWN)
    for given, path in ((None, default / "toy.pt"), (own, own)):
        with raises(
            InputError,
            path,
            "CC-BY-NC-4.0, https://example.org/licence",
            "atlassegfm.models.accept_licence('toy')",
        ):
            find_weights("toy", NON_COMMERCIAL, given)
    date = accept_licence("toy", NON_COMMERCIAL)
    assert date is not None
    assert licence_accepted("toy", NON_COMMERCIAL) == date
    for given, path in ((None, default / "toy.pt"), (own, own)):
        assert find_weights("toy", NON_COMMERCIAL, given) == path


def test_what_is_noted_of_an_acceptance(default: Path) -> None:
    date = accept_licence("toy", NON_COMMERCIAL)
    content = json.loads((default / ACCEPTANCE).read_text())
    assert content.keys() == {"model", "licence", "licence_url", "date", "atlassegfm"}
    assert (content["model"], content["licence"], content["date"]) == ("toy", "CC-BY-NC-4.0", date)
    (default / ACCEPTANCE).write_text(json.dumps(content | {"date": "2020-01-01"}))
    assert accept_licence("toy", NON_COMMERCIAL) == licence_accepted("toy", NON_COMMERCIAL) == "2020-01-01"


def test_an_acceptance_is_of_one_licence_of_one_model(default: Path) -> None:
    accept_licence("toy", NON_COMMERCIAL)
    other = PublishedWeights(**(vars(NON_COMMERCIAL) | {"licence": "CC-BY-NC-ND-4.0"}))
    assert licence_accepted("toy", other) is None
    assert licence_accepted("other", NON_COMMERCIAL) is None
    accept_licence("toy", other)
    assert licence_accepted("toy", other) is not None


def test_an_acceptance_counts_in_both_folders(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_licence("toy", NON_COMMERCIAL)
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path / "all"))
    assert licence_accepted("toy", NON_COMMERCIAL) is not None
    accept_licence("other", NON_COMMERCIAL)
    assert (tmp_path / "all/other" / ACCEPTANCE).is_file()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "toy", "licence": "CC-BY-NC-4.0"}'])
def test_a_damaged_acceptance_is_none(default: Path, text: str) -> None:
    default.mkdir(parents=True)
    (default / ACCEPTANCE).write_text(text)
    assert licence_accepted("toy", NON_COMMERCIAL) is None
    accept_licence("toy", NON_COMMERCIAL)
    assert licence_accepted("toy", NON_COMMERCIAL) is not None


def test_an_acceptance_that_cannot_be_noted(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path / "file"))
    with raises(
        InputError,
        f"{tmp_path}/file/toy/{ACCEPTANCE}: cannot note there that the licence was accepted (Not a directory); set "
        "ATLASSEGFM_MODELS to a folder that you can write to",
    ):
        accept_licence("toy", NON_COMMERCIAL)
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=rf"toy/{ACCEPTANCE}: cannot note there .* \(Permission denied\); set "):
        accept_licence("toy", NON_COMMERCIAL)


def test_free_weights_need_no_acceptance(default: Path) -> None:
    assert accept_licence("toy", weights()) is None
    assert not default.exists()


# Reading checkpoints

WANTED = "the weights of the model 'toy'"


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    content = {"model": {"a": torch.arange(6.0).reshape(2, 3)}, "epoch": 3}
    for new in (True, False):
        torch.save(content, tmp_path / "toy.pt", _use_new_zipfile_serialization=new)
        read = load_state(tmp_path / "toy.pt", wanted=WANTED)
        assert read["epoch"] == 3
        assert torch.equal(read["model"]["a"], content["model"]["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"is empty; expected {WANTED}: fetch or copy it again"),
        (b"\x93NUMPY", f"is no file of PyTorch; expected {WANTED}"),
        (b"<!doctype html>", f"is a web page, or other text in angle brackets; expected {WANTED}"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            f"is a pointer of Git LFS, not the file it stands for; expected {WANTED}",
        ),
        (pickle.dumps({"a": 1}, 2), f"is cut short or damaged; expected {WANTED}: fetch or copy it again"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "toy.pt"
    path.write_bytes(content)
    with raises(ModelError, f"{path}: {message}"):
        load_state(path, wanted=WANTED)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_truncated_checkpoint(tmp_path: Path, new: bool, share: float) -> None:
    path = tmp_path / "toy.pt"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with raises(ModelError, f"{path}: is cut short or damaged; expected {WANTED}: fetch or copy it again"):
        load_state(path, wanted=WANTED)


class _Bad:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        torch.save({"a": _Bad()}, "toy.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(
            ModelError,
            match=r"^toy\.pt: holds other objects \(.+\) besides tensors and plain values, and loading these could run "
            f"any program; expected {WANTED}$",
        ):
            load_state(Path("toy.pt"), wanted=WANTED)
        assert not Path("ran").exists()


def test_single_numbers_of_numpy_are_read(tmp_path: Path) -> None:
    numbers = [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True)]
    torch.save({"model": {"a": torch.ones(2)}, "logging": numbers}, tmp_path / "toy.pt")
    assert load_state(tmp_path / "toy.pt", wanted=WANTED)["logging"] == numbers


@pytest.mark.parametrize("new", [True, False])
def test_a_checkpoint_with_another_byte(tmp_path: Path, new: bool) -> None:
    """Whatever byte of its list of contents is another one, it is read or refused; never is it taken for a program."""
    path = tmp_path / "toy.pt"
    torch.save({"model": {"a.weight": torch.zeros(7), "b": torch.zeros(2)}}, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    refused = 0
    for place in range(40, min(700, len(whole)), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        try:
            load_state(path, wanted=WANTED)
        except UnsafeCheckpointError:
            assert not new, place
        except ModelError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ([1], "", "holds one list, not weights by name"),
        ({}, "", "holds nothing, not weights by name alone"),
        ({"a": torch.zeros(1), "epoch": 3, "b": {}}, "", "holds epoch, b, not weights by name alone"),
        ({n: n for n in range(5)}, "", "holds 0, 1, 2 and 2 more, not weights by name alone"),
        ([1], "model", "holds one list and no 'model'"),
        ({}, "model", "holds nothing and no 'model'"),
        ({"a": 1, "b": 1}, "model", "holds a, b and no 'model'"),
        ({"model": 1}, "model", "holds one int as 'model', not weights by name"),
        ({"model": {"a": 1}}, "model", "holds a as 'model', not weights by name alone"),
    ],
)
def test_what_holds_no_weights(content: object, key: str, message: str) -> None:
    with raises(ModelError, f"toy.pt: {message}; expected {WANTED}"):
        named_weights(content, Path("toy.pt"), wanted=WANTED, key=key)


def test_weights_of_another_network() -> None:
    network = torch.nn.Linear(2, 3).state_dict()
    check_fit(network, network, Path("toy.pt"), wanted=WANTED)
    other = {"weight": torch.zeros(3, 4), "scale": torch.zeros(())}
    with raises(
        ModelError,
        "toy.pt: holds weights of another network: 1 missing (bias); 1 unknown (scale); 1 of another shape (weight is "
        f"3 x 4 instead of 3 x 2); expected {WANTED}",
    ):
        check_fit(other, network, Path("toy.pt"), wanted=WANTED)


def test_a_checkpoint_that_cannot_be_opened(tmp_path: Path) -> None:
    with raises(ModelError, f"{tmp_path}/toy.pt: cannot be read (No such file or directory); expected {WANTED}"):
        load_state(tmp_path / "toy.pt", wanted=WANTED)
    with raises(ModelError, f"{tmp_path}: cannot be read (Is a directory); expected {WANTED}"):
        load_state(tmp_path, wanted=WANTED)
