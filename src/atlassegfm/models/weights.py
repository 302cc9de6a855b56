"""Published weights of the models: find them, download them, record the acceptance of their licence.

Nothing is downloaded unless :func:`fetch` is called. Weights are looked for in the path the user names, else in
``$ATLASSEGFM_MODELS/MODEL``, then in ``~/.local/share/atlassegfm/models/MODEL``; those that an installed package
carries, in its folder.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ..core.errors import InputError, MissingExtraError
from ..core.files import atomic_path, write_json
from ..core.version import __version__
from .base import PublishedWeights, WeightsFile
from .download import Download

logger = logging.getLogger(__name__)

#: Environment variable that names the folder of all weights, with one folder for each model.
FOLDER_VARIABLE = "ATLASSEGFM_MODELS"
#: Files in the folder of a model: source and SHA-256 of each file that was fetched; acceptance of the licence.
RECORD, ACCEPTANCE = "weights.json", "licence-accepted.json"
_RECORDED = ("url", "revision", "size", "sha256", "date")

#: State of a file. "as fetched": no SHA-256 is published, and it is unchanged since it was fetched; "not known": there
#: is nothing to compare with; "of another revision": fetched for another revision, and unchanged since.
Verdict = Literal[
    "missing", "as published", "as fetched", "not known", "of another revision", "wrong size", "wrong sha256"
]
#: Verdicts of a file that is kept.
_GOOD: tuple[Verdict, ...] = ("as published", "as fetched", "not known")


@dataclass(frozen=True)
class StoredFile:
    """A published file, and what lies in its place on this machine.

    ``size`` in bytes is None if it is missing, ``sha256`` also if the size is wrong; ``expected`` is what is wrong.
    """

    file: WeightsFile
    path: Path
    size: int | None
    sha256: str | None
    verdict: Verdict
    expected: str = ""


@dataclass(frozen=True)
class Fetched:
    """Folder of fetched weights, all their files, and the paths of those that were downloaded."""

    folder: Path
    files: tuple[StoredFile, ...]
    downloaded: tuple[str, ...]


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def loaded_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, once in a process while its size and times stay; InputError if unreadable."""
    try:
        stat = path.stat()
        return _sha256_as_of(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=64)
def _sha256_as_of(path: Path, _state: tuple[int, ...]) -> str:
    return sha256_of(path)


def describe_file(path: Path) -> dict[str, Any]:
    """Describe a file of weights for ``run.json``: name without folders, size in bytes, SHA-256 (hexadecimal)."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": loaded_sha256(path)}


def installed_version(package: str) -> str:
    """Return the version of an installed package, by its name on the package index; "unknown" where none is noted."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def weights_folder() -> Path:
    """Return the folder of all weights; InputError if none is named and the user has no home folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    try:
        return Path(named).expanduser() if named else _default_folder()
    except RuntimeError:
        advice = f"set {FOLDER_VARIABLE} to the full path of a folder for weights"
        raise InputError(f"the home folder of this user is not known; {advice}") from None


def folders_of(name: str, published: PublishedWeights | None = None) -> tuple[Path, ...]:
    """List the folders where the weights of a model are looked for, in this order."""
    if published is not None and published.package:
        # Found without being imported: the package needs others that this program does not.
        found = importlib.util.find_spec(published.package)
        return tuple(map(Path, (found and found.submodule_search_locations) or ()))
    folders = [weights_folder() / name]
    with suppress(RuntimeError):  # a user without a home folder has nothing there
        folders.append(_default_folder() / name)
    return tuple(dict.fromkeys(folders))


def find_weights(name: str, published: PublishedWeights, given: Path | None) -> Path:
    """Find the file of a model's weights on this machine, or their folder if they are several.

    They are looked for in :func:`folders_of` unless a path is given: for one file, that file under any name or a folder
    that has it under its published name; for several, a folder, which the model checks. Raises InputError if they are
    not there, not the published ones in their folder, or their licence has not been accepted.
    """
    path = _complete_folder(name, published) if given is None else _given(name, published, given)
    if len(published.files) == 1 and path.is_dir():
        path = path / published.files[0].path
    _require_licence(name, published, path)
    for file, place in _places(published, path, given):
        if file.sha256 is not None and place.is_file() and (found := loaded_sha256(place)) != file.sha256:
            if given is None:
                again = f"move it away and run atlassegfm models fetch {name}"
                if published.package:
                    again = f"install {published.repository} {published.revision} again"
                raise InputError(
                    f"{place}: is not the published file: its sha256 is {found}, expected {file.sha256}; {again} "
                    "(weights of your own are named with --model-path)"
                )
            logger.warning("%s: is not the published file of the model %r; taken for weights of your own", place, name)
    return path


def folder_with_weights(published: PublishedWeights, folders: Iterable[Path]) -> Path | None:
    """Return the first folder that holds all files in their published sizes; None if none does."""
    return next((folder for folder in folders if not _wrong(published, folder)), None)


def examine(published: PublishedWeights, folder: Path) -> tuple[StoredFile, ...]:
    """Compare the files in a folder, which need not exist, with the published ones; InputError if unreadable."""
    record = _read_record(folder)
    return tuple(_examined(file, folder / file.path, record, published.revision) for file in published.files)


def fetch(
    name: str, published: PublishedWeights, folder: Path | None = None, on_stage: Callable[[str], None] | None = None
) -> Fetched:
    """Download the weights of a model that are not there yet; a partial file never has its final name.

    ``folder`` is the first of :func:`folders_of` if left out; ``on_stage`` is called with the progress of each file.
    Raises InputError if the licence has not been accepted, the folder cannot be written to or has no room, or another
    file is in the way; ModelError if the published files cannot be downloaded.
    """
    if published.package:
        installed = _complete_folder(name, published)
        return Fetched(installed, examine(published, installed), ())
    folder = folder or weights_folder() / name
    _require_licence(name, published, folder)
    before = examine(published, folder)
    for stored in before:
        kind = stored.verdict.removeprefix("wrong ")
        if kind != stored.verdict:
            found = f"its {kind} is {stored.sha256 or stored.size}, expected {stored.expected}"
            raise InputError(f"{stored.path}: not the file to fetch: {found}; move it away, then fetch again")
    wanted = [stored for stored in before if stored.verdict not in _GOOD]
    for stored in wanted:
        _fetch_one(name, published, folder, stored, on_stage or (lambda _: None))
    return Fetched(folder, examine(published, folder), tuple(stored.file.path for stored in wanted))


def licence_accepted(name: str, published: PublishedWeights | None) -> str | None:
    """Return the date (ISO 8601, UTC) on which this very licence was accepted; None if it was not, or need not be."""
    if published is None or not published.non_commercial:
        return None
    for folder in folders_of(name):
        try:
            content = json.loads((folder / ACCEPTANCE).read_text(encoding="utf-8"))
            if (content["model"], content["licence"]) == (name, published.licence):
                return str(content["date"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def accept_licence(name: str, published: PublishedWeights | None) -> str | None:
    """Record that the user accepts the licence of a model's weights; InputError if it cannot be recorded.

    Returns the date of the first acceptance; None where none is needed.
    """
    if published is None or not published.non_commercial:
        return None
    if (earlier := licence_accepted(name, published)) is not None:
        return earlier
    date, path = datetime.now(UTC).date().isoformat(), weights_folder() / name / ACCEPTANCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"model": name, **_terms(published), "date": date, "atlassegfm": __version__})
    except (OSError, InputError) as error:
        cause = getattr(error if isinstance(error, OSError) else error.__context__, "strerror", None) or error
        advice = f"set {FOLDER_VARIABLE} to a folder that you can write to"
        raise InputError(f"{path}: cannot note there that the licence was accepted ({cause}); {advice}") from None
    return date


def _terms(published: PublishedWeights) -> dict[str, str]:
    return {"licence": published.licence, "licence_url": published.licence_url}


def _require_licence(name: str, published: PublishedWeights, path: Path) -> None:
    if published.non_commercial and licence_accepted(name, published) is None:
        raise InputError(
            f"{path}: the licence of the weights of the model {name!r} has not been accepted: {published.licence}, "
            f"{published.licence_url}, no commercial use; read it, then accept it with --accept-licence of `atlassegfm "
            f"models fetch {name}` or `segment` (in Python: atlassegfm.models.accept_licence({name!r}))"
        )


def _default_folder() -> Path:
    return Path.home() / ".local" / "share" / "atlassegfm" / "models"


def _complete_folder(name: str, published: PublishedWeights) -> Path:
    """Find the folder with all files; else say which are wrong in the first folder that has some."""
    folders = folders_of(name, published)
    if not folders:
        raise MissingExtraError(f"the model {name!r}", name)
    if (complete := folder_with_weights(published, folders)) is not None:
        return complete
    partial = (one for one in folders if len(_wrong(published, one)) < len(published.files))
    folder = next(partial, folders[0])
    wrong = _wrong(published, folder)
    found = "; ".join(f"{file.path} {problem}" for file, problem in wrong.items() if problem != "missing")
    nowhere = " there, nor in ".join((f"no weights of the model {name!r}", *map(str, folders[1:])))
    found = f"{found} (weights of your own are named with --model-path)" if found else nowhere
    if published.package:
        advice = f"install {published.repository} {published.revision} again"
        raise InputError(f"{folder}: the package {published.repository}: {found}; {advice}")
    source = published.url_of(published.files[0]) if len(published.files) == 1 else published.page
    places = ", ".join(str(folder / file.path) for file in wrong)
    raise InputError(
        f"{folder}: {found}; nothing is downloaded unasked: run atlassegfm models fetch {name}, or put {places} "
        f"there from {source} (licence: {published.licence}, {published.licence_url})"
    )


def _given(name: str, published: PublishedWeights, given: Path) -> Path:
    one, names = len(published.files) == 1, ", ".join(file.path for file in published.files)
    wanted = f"the weights of the model {name!r} ({names} of {published.repository})"
    if not given.exists():
        raise InputError(f"{given}: no such file or folder; expected {wanted}")
    if given.is_file() and not one:
        raise InputError(f"{given}: is a file; expected the folder of {wanted}")
    if given.is_dir() and one and not (given / published.files[0].path).is_file():
        raise InputError(f"{given}: has no {names}; expected {wanted}: name the file itself if it is called otherwise")
    return given


def _places(published: PublishedWeights, path: Path, given: Path | None) -> Iterator[tuple[WeightsFile, Path]]:
    """Locate each file, also in a given folder that is a part of the published one."""
    if path.is_file():
        yield published.files[0], path
        return
    for file in published.files:
        parts = Path(file.path).parts
        places = [path.joinpath(*parts[n:]) for n in range(len(parts) if given is not None else 1)]
        yield file, next((place for place in places if place.is_file()), places[0])


def _wrong(published: PublishedWeights, folder: Path) -> dict[WeightsFile, str]:
    """List the files that are missing from a folder or have the wrong size, with what is wrong."""
    found: dict[WeightsFile, str] = {}
    for file in published.files:
        path = folder / file.path
        if not path.is_file():
            found[file] = "missing"
        elif file.size not in (None, size := path.stat().st_size):
            found[file] = f"has {size} bytes, expected {file.size}"
    return found


def _examined(file: WeightsFile, path: Path, record: dict[str, Any], revision: str) -> StoredFile:
    if not path.is_file():
        if path.exists():
            raise InputError(f"{path}: is not a file, but the weights are to lie there; move it away")
        return StoredFile(file, path, None, None, "missing")
    kept = record.get(file.path)
    # It differs from a damaged file in that it is as recorded.
    other = kept is not None and kept["revision"] != revision
    recorded = None if kept is None else str(kept["sha256"])
    known_size = file.size if file.size is not None or kept is None else int(kept["size"])
    found = partial(StoredFile, file, path)
    try:
        size = path.stat().st_size
        if known_size not in (None, size) and not other:
            return found(size, None, "wrong size", str(known_size))
        sha256 = sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    expected = file.sha256 or recorded
    if other and sha256 == recorded != file.sha256:
        return found(size, sha256, "of another revision")
    if expected not in (None, sha256):
        return found(size, sha256, "wrong sha256", str(expected))
    verdict: Verdict = "as published" if file.sha256 else "not known" if expected is None else "as fetched"
    return found(size, sha256, verdict)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); check the permissions")


def _read_record(folder: Path) -> dict[str, Any]:
    """Read the record of what was fetched, by path below the folder."""
    path = folder / RECORD
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {key: one[key] for key in _RECORDED} for name, one in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; delete it, then fetch the weights again") from None


def _fetch_one(
    name: str, published: PublishedWeights, folder: Path, stored: StoredFile, on_stage: Callable[[str], None]
) -> None:
    """Download one file and record it."""
    file, target = stored.file, stored.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = f"choose another folder with --folder, or set {FOLDER_VARIABLE}"
        raise InputError(f"{target.parent}: cannot be made ({error.strerror}); {advice}") from None
    with atomic_path(target) as temporary:
        download = Download(published.url_of(file), published.page, target, file.size, file.sha256)
        download.to(temporary, on_stage, file.path)
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
    values = (download.url, published.revision, size, sha256, datetime.now(UTC).date().isoformat())
    record = _read_record(folder) | {file.path: dict(zip(_RECORDED, values, strict=True))}
    origin = {"model": name, "repository": published.repository, **_terms(published), "atlassegfm": __version__}
    write_json(folder / RECORD, {**origin, "files": record})
