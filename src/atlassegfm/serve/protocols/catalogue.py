"""How other programs name cases and structures, and which case a scan is that they show."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ...context import Context
from ...core.errors import AtlasSegError
from ...core.image import load_volume
from ...dicom import Series, find_series
from ...jobs.table import read_run
from ...records import EDITS, RUN, SEGMENTATION, STATUS, RunRecord, StatusRecord, label_map_of
from ..cases import Cases
from ..session import Session, remark_of

#: Intensities of one scan, read by two programs, may differ by this fraction of their range.
_SAME = 1e-4


class Turn(NamedTuple):
    """How the axes of one array become those of another: which one each axis is, and which of those are flipped."""

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn an array; a view."""
        turned = array.transpose(self.axes)
        return turned[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


class Recognised(NamedTuple):
    """A case that shows a scan, opened, and how arrays of it become arrays of that scan."""

    number: int
    session: Session
    turn: Turn


#: Of an array whatever the order of its axes: its sizes, then least, largest and mean value.
_Digest = tuple[tuple[int, ...], tuple[float, float, float]]


def _digest(data: NDArray[np.float32]) -> _Digest:
    values = (float(data.min()), float(data.max()), float(data.mean(dtype=np.float64)))
    return tuple(sorted(data.shape)), values


@dataclass(frozen=True)
class _Cached:
    stamp: tuple[int, int]
    value: Any


class Catalogue:
    """Cases by identifiers that say nothing of a patient and stay the same; structures of all cases, numbered from 1.

    A case is found by its identifier, by its name, and by the series of its DICOM files.
    """

    def __init__(self, cases: Cases, context: Path | None = None) -> None:
        self._cases, self._context, self._lock = cases, context, RLock()
        self._ids = [_identifier(one.case.name) for one in cases.entries]
        self._by_id = {name: n for n, name in enumerate(self._ids)}
        self._by_id |= {one.case.name: n for n, one in enumerate(cases.entries)}
        self._kept: dict[tuple[str, int], _Cached] = {}

    @property
    def ids(self) -> Sequence[str]:
        """Identifiers of the cases, by number."""
        return self._ids

    def find(self, image: str) -> int:
        """Find the number of a case; KeyError if there is none."""
        if image in self._by_id:
            return self._by_id[image]
        if image and set(image) <= set("0123456789."):
            for number in range(len(self._cases.entries)):
                series = self.series_of(number)
                if series is not None and series.uid == image:
                    return number
        raise KeyError(image)

    def names(self) -> tuple[str, ...]:
        """Names of the structures of the context and of all results, in order of appearance."""
        found = dict.fromkeys(() if self._context is None else self._context_names)
        for number in range(len(self._cases.entries)):
            found |= dict.fromkeys(self.names_of(number))
        return tuple(found)

    def values(self) -> dict[str, int]:
        """Give the value of each structure in label maps that are sent: its place among all, from 1 on."""
        return {name: n for n, name in enumerate(self.names(), start=1)}

    def names_of(self, number: int) -> tuple[str, ...]:
        """Names of the structures of a case; none before it has a result."""
        run = self.run_of(number)
        return () if run is None else tuple(one.name for one in run.structures)

    def run_of(self, number: int) -> RunRecord | None:
        """Read what came out for a case; None before it has a result."""
        folder = self._cases.folder(number)
        found: RunRecord | None = self._once("run", number, folder / RUN, partial(read_run, folder))
        return found

    def remark_of(self, number: int) -> dict[str, str]:
        """Read what was said of a case last; empty if nothing was."""
        folder = self._cases.folder(number)
        return dict(self._once("remark", number, folder / EDITS, partial(remark_of, folder)))

    @cached_property
    def _context_names(self) -> Sequence[str]:
        return () if self._context is None else Context.load(self._context).atlas.names

    def recognise(self, data: NDArray[Any]) -> Recognised | None:
        """Find the case with a result whose scan has these voxels, in whatever order of axes; None if none has."""
        data = np.asarray(data, np.float32)
        digest = _digest(data)
        for number, entry in enumerate(self._cases.entries):
            folder = self._cases.folder(number)
            if not entry.has_scan or not (folder / RUN).is_file() or self._shape(number) != digest[0]:
                continue
            known = self._kept.get(("digest", number))
            if known is not None and not _is_near(known.value, digest):
                continue
            try:
                session = self._cases.open(number)
            except AtlasSegError:  # its own problem, which the list shows
                continue
            own: _Digest = self._once("digest", number, entry.case.query, partial(_digest, session.scan.data))
            turn = _turn_between(session.scan.data, data) if _is_near(own, digest) else None
            if turn is not None:
                return Recognised(number, session, turn)
        return None

    def _shape(self, number: int) -> tuple[int, ...]:
        path = label_map_of(self._cases.folder(number))

        def read() -> tuple[int, ...]:
            # Of the usual format the header is enough.
            plain = path.name == SEGMENTATION and path.is_file()
            shape: tuple[int, ...] = (
                nib.nifti1.Nifti1Image.from_filename(path).shape if plain else load_volume(path).grid.shape
            )
            return tuple(sorted(shape))

        return tuple(self._once("shape", number, path, read))

    def series_of(self, number: int) -> Series | None:
        """Find the DICOM series of a case, without its pixels; None if it has none that can be read."""
        folder, entry = self._cases.folder(number), self._cases.get(number)
        query = entry.case.query
        if not entry.has_scan or not query.is_dir():
            return None

        def read() -> Series | None:
            status = StatusRecord.read(folder / STATUS) if (folder / STATUS).is_file() else None
            provenance = None if status is None else status.provenance
            try:
                return find_series(query, None if provenance is None else provenance.series)[0]
            except AtlasSegError:  # its own problem, which the list shows
                return None

        found: Series | None = self._once("series", number, folder / STATUS, read)
        return found

    def series(self) -> list[Series]:
        """Find the DICOM series of all cases that have one."""
        found = map(self.series_of, range(len(self._cases.entries)))
        return [one for one in found if one is not None]

    def _once(self, what: str, number: int, path: Path, read: Callable[[], Any]) -> Any:
        """Read something once for each state of a file."""
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
        except OSError:
            stamp = (0, 0)
        with self._lock:
            known = self._kept.get((what, number))
            if known is None or known.stamp != stamp:
                known = self._kept[what, number] = _Cached(stamp, read())
            return known.value


def _identifier(name: str) -> str:
    return f"case-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _is_near(one: _Digest, other: _Digest) -> bool:
    scale = max(one[1][1] - one[1][0], 1e-6)
    return one[0] == other[0] and all(abs(a - b) <= _SAME * scale for a, b in zip(one[1], other[1], strict=True))


def _turn_between(scan: NDArray[np.float32], data: NDArray[np.float32]) -> Turn | None:
    """Find how the axes of a scan become those of an array with the same voxels; None if they do not."""
    tolerance = _SAME * max(float(scan.max()) - float(scan.min()), 1e-6)
    for axes in itertools.permutations((0, 1, 2)):
        if tuple(scan.shape[n] for n in axes) != data.shape:
            continue
        for flips in itertools.product((False, True), repeat=3):
            turn = Turn((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))
            pairs = zip(turn.apply(scan), data, strict=True)  # the first slab already differs, mostly
            if all(np.abs(one - other).max() <= tolerance for one, other in pairs):
                return turn
    return None
