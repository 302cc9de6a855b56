"""Weights of the segmentation models: what is published, where it lies on this machine, and its licence.

Nothing is downloaded unless :func:`fetch` is asked for. Weights keep their own terms; they are never part of this
package.

The weights of a model are looked for in the file or folder the user names; else in the folder of its name in
``$ATLASSEGFM_MODELS``, then in ``~/.local/share/atlassegfm/models``. The folder a model is fetched into also holds
``weights.json``: where each file came from, and its SHA-256. ``licence-accepted.json`` there says that the user has
accepted the licence, where it asks for that.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import shutil
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from ..core.errors import InputError, ModelError
from ..core.files import atomic_path
from ..core.version import __version__

logger = logging.getLogger(__name__)


#: Environment variable that names the folder of all weights, with one folder for each model.
FOLDER_VARIABLE = "ATLASSEGFM_MODELS"


#: Environment variable that names a mirror of Hugging Face, as the programs of that community read it.
ENDPOINT_VARIABLE = "HF_ENDPOINT"


_ENDPOINT = "https://huggingface.co"


#: What was fetched, in the folder it was fetched into.
RECORD = "weights.json"


#: That a licence was accepted, in the model's folder.
ACCEPTANCE = "licence-accepted.json"


#: Seconds without a byte until a connection counts as broken: hospital proxies hold files back to scan them.
_TIMEOUT_S = 60.0


_CHUNK_BYTES = 1 << 20


#: What is known of a file on this machine. "as published": its SHA-256 is the published one; "as fetched": none is
#: published, and it is the one of the file that was fetched; "not known": there is nothing to compare with; "of another
#: revision": fetched for another version of this program, and unchanged since.
Verdict = Literal[
    "missing", "as published", "as fetched", "not known", "of another revision", "wrong size", "wrong sha256"
]


VERDICTS: tuple[str, ...] = get_args(Verdict)


#: Verdicts of a file that is left as it is.
_GOOD: tuple[Verdict, ...] = ("as published", "as fetched", "not known")


@dataclass(frozen=True)
class WeightsFile:
    """One published file.

    Parameters
    ----------
    path : str
        Below the model's folder, with "/".
    size : int or None
        In bytes, where known.
    sha256 : str or None
        Hexadecimal, where known.
    """

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedWeights:
    """Weights as their authors publish them.

    Parameters
    ----------
    repository : str
        On Hugging Face, "owner/name".
    revision : str
        Commit that is downloaded.
    files : tuple of WeightsFile
        What the model needs.
    licence : str
        SPDX expression, or words.
    licence_url : str
        Where it can be read.
    non_commercial : bool
        Whether it must be accepted before the weights are used.
    """

    repository: str
    revision: str
    files: tuple[WeightsFile, ...]
    licence: str
    licence_url: str
    non_commercial: bool

    @property
    def page(self) -> str:
        """Where the files can be looked at."""
        return f"{_endpoint()}/{self.repository}/tree/{urllib.parse.quote(self.revision, safe='')}"

    def url_of(self, file: WeightsFile) -> str:
        """Where a file is downloaded from.

        Raises
        ------
        InputError
            If the mirror that the environment names is not an address.
        """
        revision, path = urllib.parse.quote(self.revision, safe=""), urllib.parse.quote(file.path)
        return f"{_endpoint()}/{self.repository}/resolve/{revision}/{path}"


@dataclass(frozen=True)
class LocalWeights:
    """Weights found on this machine.

    Parameters
    ----------
    path : Path
        The file, where the model has one; the folder, where it has several, or where the user names a folder that does
        not hold them under their published names.
    licence : str
        Of the published weights they stand for.
    licence_accepted : str or None
        Date (ISO 8601, UTC) on which the user accepted it; None where it need not be.
    """

    path: Path
    licence: str
    licence_accepted: str | None = None


@dataclass(frozen=True)
class StoredFile:
    """A published file, and what lies in its place on this machine.

    Parameters
    ----------
    file : WeightsFile
        As published.
    path : Path
        Its place.
    size : int or None
        In bytes; None if it is missing.
    sha256 : str or None
        Hexadecimal; None if it is missing or has the wrong size.
    verdict : str
        One of :data:`VERDICTS`.
    expected : str
        The size or SHA-256 it should have, where the verdict is that it is wrong.
    """

    file: WeightsFile
    path: Path
    size: int | None
    sha256: str | None
    verdict: Verdict
    expected: str = ""


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch` did.

    Parameters
    ----------
    folder : Path
        Where the files lie.
    files : tuple of StoredFile
        All of them.
    downloaded : tuple of str
        Paths below the folder of those that were not there already.
    """

    folder: Path
    files: tuple[StoredFile, ...]
    downloaded: tuple[str, ...]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def loaded_sha256(path: Path) -> str:
    """SHA-256 of a file that is loaded, hexadecimal; read once in a process as long as size and times stay.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        stat = path.stat()
        return _sha256_as_of(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=64)
def _sha256_as_of(path: Path, _state: tuple[int, ...]) -> str:
    return sha256_of(path)


def weights_folder() -> Path:
    """Folder of all weights: ``$ATLASSEGFM_MODELS``, or ``~/.local/share/atlassegfm/models``.

    Raises
    ------
    InputError
        If the user has no home folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    try:
        return Path(named).expanduser() if named else _default_folder()
    except RuntimeError:
        raise InputError(
            f"the home folder of this user is not known; set {FOLDER_VARIABLE} to the full path of a folder for weights"
        ) from None


def folders_of(name: str) -> tuple[Path, ...]:
    """Where the weights of a model are looked for if the user names no path, the first folder first."""
    folders = [weights_folder() / name]
    with suppress(RuntimeError):  # a user without a home folder has nothing there
        folders.append(_default_folder() / name)
    return tuple(dict.fromkeys(folders))


def find_weights(name: str, published: PublishedWeights, given: Path | None) -> LocalWeights:
    """Where the weights of a model lie on this machine, if the user may use them.

    Parameters
    ----------
    name : str
        Of the model.
    published : PublishedWeights
        What is looked for.
    given : Path or None
        File or folder the user names. For weights of one file: the file under any name, or a folder that has it under
        its published name. For weights of several files: a folder, whose content is left to the model to check, as it
        may hold other weights of the same kind. The folders of :func:`folders_of` if None.

    Raises
    ------
    InputError
        If they are not there, or their licence must be accepted and has not been.
    """
    path = _complete_folder(name, published) if given is None else _given(name, published, given)
    if len(published.files) == 1 and path.is_dir():
        path = path / published.files[0].path
    accepted = licence_accepted(name, published)
    if published.non_commercial and accepted is None:
        raise InputError(
            f"{path}: the licence of the weights of the model {name!r} has not been accepted: {published.licence}, "
            f"{published.licence_url}, no commercial use; read it, then accept it with: atlassegfm models fetch {name} "
            "--accept-licence, or with the option --accept-licence of the command, as segment --accept-licence "
            f"(in Python: atlassegfm.models.accept_licence({name!r}))"
        )
    for file, place in _places(published, path, given):
        if file.sha256 is not None and place.is_file() and (found := loaded_sha256(place)) != file.sha256:
            if given is None:
                raise InputError(
                    f"{place}: is not the published file: its sha256 is {found}, expected {file.sha256}; move it away "
                    f"and run atlassegfm models fetch {name} (weights of your own are named with --model-path)"
                )
            logger.warning("%s: is not the published file of the model %r; taken for weights of your own", place, name)
    return LocalWeights(path, published.licence, accepted)


def folder_with_weights(published: PublishedWeights, folders: Iterable[Path]) -> Path | None:
    """The first of some folders that holds all files in their published sizes; None if none does."""
    return next((folder for folder in folders if not _wrong(published, folder)), None)


def examine(published: PublishedWeights, folder: Path) -> tuple[StoredFile, ...]:
    """Compare what lies in a folder with what is published, byte for byte where a SHA-256 is known.

    Parameters
    ----------
    published : PublishedWeights
        What it should hold.
    folder : Path
        Of one model; need not exist.

    Raises
    ------
    InputError
        If a file cannot be read, or the record of what was fetched is damaged.
    """
    record = _read_record(folder)
    return tuple(_examined(file, folder / file.path, record, published.revision) for file in published.files)


def fetch(
    name: str,
    published: PublishedWeights,
    folder: Path | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Fetched:
    """Download the weights of a model; files that are there already stay.

    Each file is written under a temporary name in its folder, checked, and then moved to its own: whatever happens,
    there is never a part of a file under that name.

    Parameters
    ----------
    name : str
        Of the model.
    published : PublishedWeights
        What to download.
    folder : Path, optional
        For the files; the first of :func:`folders_of` if left out.
    on_stage : callable, optional
        Told of each file as its download begins, and then of its progress, as "downloading FILE: 10 %, ...".

    Raises
    ------
    InputError
        If the licence must be accepted and has not been, the folder cannot be written to or has no room, or another
        file is in the way.
    ModelError
        If the files cannot be had, or are not the published ones.
    """
    if published.non_commercial and licence_accepted(name, published) is None:
        raise InputError(
            f"the licence of the weights of the model {name!r} must be accepted before they are fetched: "
            f"{published.licence}, {published.licence_url}, no commercial use; read it, then add --accept-licence "
            f"(in Python: atlassegfm.models.accept_licence({name!r}))"
        )
    folder = weights_folder() / name if folder is None else folder
    before = examine(published, folder)
    for stored in before:
        if stored.verdict.startswith("wrong"):
            kind = stored.verdict.removeprefix("wrong ")
            found = stored.size if kind == "size" else stored.sha256
            raise InputError(
                f"{stored.path}: is not the file that would be fetched: its {kind} is {found}, expected "
                f"{stored.expected}; move it away, then fetch again"
            )
    wanted = [stored for stored in before if stored.verdict not in _GOOD]
    for stored in wanted:
        _fetch_one(name, published, folder, stored, on_stage or (lambda _: None))
    return Fetched(folder, examine(published, folder), tuple(stored.file.path for stored in wanted))


def licence_accepted(name: str, published: PublishedWeights) -> str | None:
    """Date (ISO 8601, UTC) on which the licence of a model's weights was accepted; None if it was not, or need not be.

    It counts in all of :func:`folders_of`, wherever the weights lie, and for the licence it was given for alone.
    """
    if not published.non_commercial:
        return None
    for folder in folders_of(name):
        try:
            content = json.loads((folder / ACCEPTANCE).read_text(encoding="utf-8"))
            if (content["model"], content["licence"]) == (name, published.licence):
                return str(content["date"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # nobody's consent can be read out of that
    return None


def accept_licence(name: str, published: PublishedWeights) -> str | None:
    """Note that the user accepts the licence of a model's weights.

    Parameters
    ----------
    name : str
        Of the model.
    published : PublishedWeights
        Its weights.

    Returns
    -------
    str or None
        The date of the acceptance, which is an earlier one if there is; None where none is needed.

    Raises
    ------
    InputError
        If it cannot be noted.
    """
    if not published.non_commercial:
        return None
    earlier = licence_accepted(name, published)
    if earlier is not None:
        return earlier
    content = {
        "model": name,
        "licence": published.licence,
        "licence_url": published.licence_url,
        "date": _today(),
        "atlassegfm": __version__,
    }
    path = weights_folder() / name / ACCEPTANCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, content)
    except (OSError, InputError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        raise InputError(
            f"{path}: cannot note there that the licence was accepted ({getattr(cause, 'strerror', None) or error}); "
            f"set {FOLDER_VARIABLE} to a folder that you can write to"
        ) from None
    return str(content["date"])


def _default_folder() -> Path:
    return Path.home() / ".local" / "share" / "atlassegfm" / "models"


def _complete_folder(name: str, published: PublishedWeights) -> Path:
    first, *others = folders_of(name)
    folder = folder_with_weights(published, (first, *others))
    if folder is not None:
        return folder
    # Of the folders that hold a part, the first is meant.
    folder = next((one for one in (first, *others) if len(_wrong(published, one)) < len(published.files)), first)
    wrong = _wrong(published, folder)
    if all(problem == "missing" for problem in wrong.values()):
        found = f"no weights of the model {name!r}" + (" there, nor in " + str(others[0]) if others else "")
    else:
        found = "; ".join(f"{file.path} {problem}" for file, problem in wrong.items() if problem != "missing")
        found += " (weights of your own are named with --model-path)"
    one = len(published.files) == 1
    source = published.url_of(published.files[0]) if one else published.page
    places = ", ".join(str(folder / file.path) for file in wrong)
    what = "the file" if len(wrong) == 1 else "the files"
    raise InputError(
        f"{folder}: {found}; nothing is downloaded unasked: run atlassegfm models fetch {name}, or put {what} {places} "
        f"there from {source} (licence: {published.licence}, {published.licence_url})"
    )


def _given(name: str, published: PublishedWeights, given: Path) -> Path:
    names = ", ".join(file.path for file in published.files)
    one = len(published.files) == 1
    wanted = f"the weights of the model {name!r} ({names} of {published.repository})"
    if not given.exists():
        raise InputError(f"{given}: no such file or folder; expected {wanted}")
    if given.is_file() and not one:
        raise InputError(f"{given}: is a file; expected the folder of {wanted}")
    if given.is_dir() and one and not (given / published.files[0].path).is_file():
        raise InputError(
            f"{given}: has no {names}; expected {wanted}: name the file itself where it is called otherwise"
        )
    return given


def _places(published: PublishedWeights, path: Path, given: Path | None) -> Iterator[tuple[WeightsFile, Path]]:
    """Where each file lies; in a given folder also if that is a part of the published one, or has another name."""
    if path.is_file():
        yield published.files[0], path
        return
    for file in published.files:
        parts = Path(file.path).parts
        places = [path.joinpath(*parts[n:]) for n in range(len(parts) if given is not None else 1)]
        yield file, next((place for place in places if place.is_file()), places[0])


def _wrong(published: PublishedWeights, folder: Path) -> dict[WeightsFile, str]:
    """Files that are missing from a folder or have another size than the published one, with what is wrong."""
    found: dict[WeightsFile, str] = {}
    for file in published.files:
        path = folder / file.path
        if not path.is_file():
            found[file] = "missing"
        elif file.size is not None and path.stat().st_size != file.size:
            found[file] = f"has {path.stat().st_size} bytes, expected {file.size}"
    return found


def _examined(file: WeightsFile, path: Path, record: dict[str, Any], revision: str) -> StoredFile:
    if not path.is_file():
        if path.exists():
            raise InputError(f"{path}: is not a file, but the weights are to lie there; move it away")
        return StoredFile(file, path, None, None, "missing")
    kept = record.get(file.path)
    try:
        size = path.stat().st_size
        # A file that was fetched for another version is told from a damaged one by what was noted then.
        other = kept is not None and kept["revision"] != revision
        known_size = file.size if file.size is not None or kept is None else int(kept["size"])
        if known_size is not None and size != known_size and not other:
            return StoredFile(file, path, size, None, "wrong size", str(known_size))
        sha256 = sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    noted = None if kept is None else str(kept["sha256"])
    expected = file.sha256 or noted
    if sha256 == file.sha256:
        verdict: Verdict = "as published"
    elif other and sha256 == noted:
        verdict = "of another revision"
    elif expected is None:
        verdict = "not known"
    elif sha256 == expected:
        verdict = "as fetched"
    else:
        return StoredFile(file, path, size, sha256, "wrong sha256", expected)
    return StoredFile(file, path, size, sha256, verdict)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); check the permissions")


def _read_record(folder: Path) -> dict[str, Any]:
    """What was noted of each file that was fetched, by its path below the folder."""
    path = folder / RECORD
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            str(name): {key: one[key] for key in ("url", "revision", "size", "sha256", "date")}
            for name, one in files.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; delete it, then fetch the weights again") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _endpoint() -> str:
    endpoint = os.environ.get(ENDPOINT_VARIABLE) or _ENDPOINT
    try:
        parts = urllib.parse.urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{ENDPOINT_VARIABLE} is {endpoint!r}; expected the address of a mirror, as {_ENDPOINT}")
    return endpoint.rstrip("/")


def _fetch_one(
    name: str, published: PublishedWeights, folder: Path, stored: StoredFile, tell: Callable[[str], None]
) -> None:
    """Download one file and note what it was."""
    url, target = published.url_of(stored.file), stored.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target.parent}: cannot be made ({error.strerror}); choose another folder with --folder, or set "
            f"{FOLDER_VARIABLE}"
        ) from None
    with atomic_path(target) as temporary:
        size, sha256 = _download(stored.file, url, published.page, target, temporary, tell)
        if stored.file.sha256 not in (None, sha256):
            raise ModelError(
                f"{target}: what {url} gives is not the published file: its sha256 is {sha256}, expected "
                f"{stored.file.sha256}; nothing was kept, try again, or without the mirror if there is one"
            )
    record = _read_record(folder)
    record[stored.file.path] = {
        "url": url,
        "revision": published.revision,
        "size": size,
        "sha256": sha256,
        "date": _today(),
    }
    content = {
        "model": name,
        "repository": published.repository,
        "licence": published.licence,
        "licence_url": published.licence_url,
        "atlassegfm": __version__,
        "files": record,
    }
    _write_json(folder / RECORD, content)


def _download(
    file: WeightsFile, url: str, page: str, target: Path, temporary: Path, tell: Callable[[str], None]
) -> tuple[int, str]:
    """Write what an address gives; its size and SHA-256. The target is where it will lie, for messages."""
    stage = f"downloading {file.path}"
    tell(stage)
    digest, done, percent = hashlib.sha256(), 0, -1
    with _answer(url, page, target) as answer:
        promised = answer.headers.get("Content-Length")
        total = int(promised) if promised is not None and promised.isdecimal() else file.size
        if answer.headers.get_content_type() == "text/html":
            raise ModelError(
                f"{url}: gives a web page, not the file, as a network does that wants a login first; log in, or "
                f"download it with a browser from {page} and put it at {target}"
            )
        if file.size is not None and total != file.size:
            raise ModelError(f"{url}: gives {total} bytes, expected {file.size}; {_elsewhere(page, target)}")
        free = shutil.disk_usage(temporary.parent).free
        if total is not None and total > free:
            raise InputError(
                f"{target}: needs {_megabytes(total)}, and {_megabytes(free)} are free there; make room, or choose "
                f"another folder with --folder, or set {FOLDER_VARIABLE}"
            )
        with temporary.open("wb") as out:
            while chunk := _read(answer, url, done, total):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if total and done * 100 // total != percent:
                    percent = done * 100 // total
                    tell(f"{stage}: {percent} %, {_megabytes(done)} of {_megabytes(total)}")
    if total is not None and done != total:
        raise _broken(url, done, total)
    return done, digest.hexdigest()


@contextmanager
def _answer(url: str, page: str, target: Path) -> Iterator[http.client.HTTPResponse]:
    """The open connection; what can go wrong with it becomes a sentence."""
    request = urllib.request.Request(url, headers={"User-Agent": f"atlassegfm/{__version__}"})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        _refused(error, url, page, target)
    except (OSError, http.client.HTTPException) as error:
        # urlopen wraps what happens while it connects, and not what happens while the server answers.
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        host = urllib.parse.urlsplit(url).netloc
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise ModelError(
                f"{url}: the certificate of {host} cannot be verified ({reason.verify_message}); where a proxy of your "
                "institution stands between, set SSL_CERT_FILE to its certificates"
            ) from None
        raise ModelError(
            f"{url}: no connection to {host} ({_words(reason)}); check the network and the proxy (HTTPS_PROXY), set "
            f"{ENDPOINT_VARIABLE} to a mirror, or download the file on another machine and put it at {target}"
        ) from None
    with answer:
        yield answer


def _read(answer: http.client.HTTPResponse, url: str, done: int, total: int | None) -> bytes:
    try:
        return answer.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException):
        raise _broken(url, done, total) from None


def _broken(url: str, done: int, total: int | None) -> ModelError:
    whole = "" if total is None else f" of {total}"
    return ModelError(f"{url}: the connection broke off after {done}{whole} bytes; nothing was kept, try again")


def _refused(error: urllib.error.HTTPError, url: str, page: str, target: Path) -> NoReturn:
    """What a server means by its number."""
    if error.code == 404:
        raise ModelError(f"{url}: no such file on the server (404); {_elsewhere(page, target)}") from None
    if error.code in (401, 403):
        raise ModelError(
            f"{url}: the server does not let everybody have it ({error.code}); it may want an account, or its terms "
            f"accepted: {_elsewhere(page, target)}"
        ) from None
    raise ModelError(f"{url}: the server answered {error.code} ({error.reason}); try again later") from None


def _elsewhere(page: str, target: Path) -> str:
    return f"look at {page} in a browser, and put the file at {target}"


def _words(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if isinstance(reason, socket.gaierror):
        return "its name is not known"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason) or type(reason).__name__


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
