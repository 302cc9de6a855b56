"""Results of a folder with the scans they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import InputError
from ..core.image import Volume, load_labels
from ..core.labels import Structure, listed
from ..core.text import counted
from ..dicom import open_image
from ..jobs import scans_of
from ..jobs.store import read_labels, structures_in
from ..records import RunRecord
from ..report.folder import read_folder, shown_reason

#: Label maps of ``--keep``: warped atlas, model.
_KEPT = ("atlas.nii.gz", "model.nii.gz")


@dataclass(frozen=True, eq=False)
class Result:
    """The result of one case, and where its scan lies."""

    name: str  # of its folder
    folder: Path
    run: RunRecord = field(repr=False)
    scan: Path  # image file or folder of a DICOM series
    series: str | None  # of that folder
    structures: tuple[Structure, ...]

    def read(self) -> tuple[Volume, Volume]:
        """Read the scan, float32 as stored, and the labels on its voxels; InputError if one cannot be used."""
        scan = open_image(self.scan, self.series if self.scan.is_dir() else None)
        return scan, read_labels(self.folder, scan, self.structures)

    def read_opinions(self, scan: Volume) -> list[Volume]:
        """Read what warped atlas and model alone say, on the voxels of the scan; empty without ``--keep``."""
        paths = [self.folder / name for name in _KEPT]
        return [load_labels(path, allow_empty=True).turned_to(scan.grid) for path in paths if path.is_file()]


@dataclass
class Found:
    """Results to export, by name of the case, and why others are left out."""

    results: list[Result]
    left_out: dict[str, str]


def find_results(out: Path, images: Sequence[Path]) -> Found:
    """Find the results of a folder and, among ``images``, their scans by content.

    InputError if it holds no results, or none of them can be exported.
    """
    folder = read_folder(out)
    left_out = {one.name: f"{one.state}: {one.reason}" if one.reason else one.state for one in folder.failures}
    matched = scans_of(out, images)
    found = Found([], left_out)
    for case in folder.cases:
        if case.name in matched.scans:
            structures = structures_in(case.folder, case.run)
            found.results.append(
                Result(case.name, case.folder, case.run, matched.scans[case.name], case.series, structures)
            )
        else:
            left_out[case.name] = "its scan is not among the images, or has changed since it was segmented"
    if not found.results:
        raise none_left(out, left_out)
    return found


def structures_of_all(results: Iterable[Result]) -> tuple[Structure, ...]:
    """List the structures of several results by label value; InputError if they do not agree on value and name."""
    known: dict[int, tuple[Structure, Result]] = {}
    for result in results:
        for one in result.structures:
            first, of = known.setdefault(one.value, (one, result))
            if first.name != one.name:
                both = f"{first.name!r} in {of.folder}, and {one.name!r} in {result.folder}"
                raise InputError(f"label {one.value} is {both}; export results of different atlases apart")
    return tuple(known[value][0] for value in sorted(known))


def none_left(folder: Path, left_out: Mapping[str, str]) -> InputError:
    """Build the error that no case is left, with some of the reasons."""
    reasons = listed([f"{name}: {reason}" for name, reason in sorted(left_out.items())], 3, "; ")
    return InputError(f"{folder}: none of {counted(len(left_out), 'case')} can be exported ({reasons})")


def told(error: InputError) -> str:
    """Give the reason of an error without the folders of paths, which may name patients."""
    return shown_reason(str(error))
