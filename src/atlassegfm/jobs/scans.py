"""Scans below folders: one folder a patient, nnU-Net and BIDS datasets, DICOM trees. What is not taken is named."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib

from ..context import ONE_ATLAS_NAMES
from ..core.bids import BidsName, Wanted, parse_wanted
from ..core.errors import AtlasSegError, InputError
from ..core.files import PathLike
from ..core.image import NIFTI_SUFFIXES, image_stem, image_suffix
from ..core.itk import SEGMENTATION_SUFFIX
from ..core.labels import listed
from ..dicom import SCAN_MODALITIES, is_dicom, modalities_in
from ..records import RUN, STATUS, FileRecord
from .fingerprint import file_record, is_unchanged, place_of, query_of
from .table import read_run

#: Folders are walked so deep: project / site / patient / visit / study / series and two more.
_MOST_LEVELS = 8
#: A word of a file's name that says it holds labels, and names of folders of them.
_LABEL_WORD = re.compile(r"(^|[^a-z])(seg|dseg|segmentations?|masks?|labels?|labelmaps?)([^a-z]|$)", re.IGNORECASE)
_LABEL_FOLDER = re.compile(r"seg|segmentations?|masks?|labels?(tr|ts|val)?", re.IGNORECASE)
#: Folders of a BIDS dataset that hold no scan of a structure.
_BIDS_OTHERS = frozenset({"derivatives", "sourcedata", "code", "stimuli", "func", "dwi", "fmap", "perf", "meg", "eeg"})
#: An nnU-Net image: case and channel.
_NNUNET_IMAGE = re.compile(r"(.+)_(\d{4})")
#: NIfTI intent code of label maps.
_INTENT_LABEL = 1002
_NO_IMAGE, _TAKEN = "no image file", "already taken"


@dataclass
class Scans:
    """Scans that were found, and what else is there."""

    found: list[Path] = field(default_factory=list)  # image files and folders of DICOM series, in order of their names
    left_out: dict[str, list[Path]] = field(default_factory=dict)  # by reason
    #: Real paths that are no scans where they are met in a folder: other inputs of the command.
    inputs: frozenset[str] = frozenset()
    #: Entities and suffix of the BIDS names to take in folders; empty for every scan.
    wanted: Wanted = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def take(self, path: Path, *, named: bool = False) -> None:
        """Take a scan, unless it is taken already or, if it was not named itself, another input."""
        place = os.path.realpath(path)
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # bytes that are no UTF-8, as Python keeps them
            self.leave(path, "a name that is not UTF-8: rename it")
        elif place in self._taken:
            self.leave(path, _TAKEN)
        elif place in self.inputs and not named:
            self.leave(path, "another input of this command")
        elif self.wanted and not named and not BidsName.of(path).fits(self.wanted):
            self.leave(path, "other BIDS entities")
        else:
            self._taken.add(place)
            self.found.append(path)

    def leave(self, path: Path, reason: str) -> None:
        """Leave a file or folder out."""
        self.left_out.setdefault(reason, []).append(path)

    def remarks(self) -> list[str]:
        """Describe what is left out, a line for each reason."""
        return [f"left out, {reason}: {listed([*map(str, paths)], 4)}" for reason, paths in self.left_out.items()]


def find_scans(
    paths: Iterable[PathLike],
    *,
    inputs: Iterable[PathLike] = (),
    labels: bool = False,
    entities: Sequence[str] = (),
) -> Scans:
    """Find the scans that paths stand for: files, taken as they are, and folders with scans anywhere below.

    A folder may be that of a DICOM series. ``inputs`` are other files of the command, as the atlas: left out where they
    are met in a folder, as are label maps without ``labels``. With ``entities`` ("sub-01", "T1w") only scans of such
    BIDS names are taken in folders. InputError if a folder holds no scan, or cannot be read.
    """
    scans = Scans(inputs=frozenset(os.path.realpath(os.fspath(path)) for path in inputs), wanted=parse_wanted(entities))
    for path in map(Path, paths):
        before = len(scans.found)
        if path.is_dir():
            _walk(path, scans, labels, [], bids=False)
        else:
            scans.take(path, named=True)
        if len(scans.found) == before and _TAKEN not in scans.left_out:
            rest = "; ".join(scans.remarks())
            raise InputError(
                f"{path}: no scan here; expected an image file, or a folder with image files or DICOM series below"
                + (f" ({rest})" if rest else "")
            )
    return scans


class Matched(NamedTuple):
    """Which scan belongs to which case of a folder of results."""

    scans: dict[str, Path]  # by name of the case
    changed: list[Path]  # at the place of a case's scan, with other content
    unused: list[Path]  # of no case


def scans_of(folder: PathLike, images: Iterable[PathLike]) -> Matched:
    """Find the scans of a folder of results, one folder a case, among images: by content, whatever their names.

    A result that does not record its scan's content is matched by file name, where no other case or image has it.
    Images are paths as for :func:`find_scans`; InputError if one does not exist, or a folder holds no scan.
    """
    folder, paths = Path(folder), list(map(Path, images))
    for image in paths:
        if not image.exists():
            raise InputError(f"{image}: no such file or folder; expected the scans that were segmented")
    given = find_scans(paths)
    cases = [path.parent for path in sorted(folder.glob(f"*/{RUN}"))] if given.found else []
    records = {case.name: record for case in cases if (record := query_of(case)) is not None}
    places = {place_of(path): path for path in [*itertools.chain(*given.left_out.values()), *given.found]}
    at_place = {name: places[record.place] for name, record in records.items() if record.place in places}
    stamps = Counter(one.stamp for one in records.values())

    def is_same(path: Path, record: FileRecord) -> bool:
        # Sizes and times of an archive may be those of several scans.
        return is_unchanged(path, record) and (stamps[record.stamp] == 1 or _content(path) == record.sha256)

    scans = {name: path for name, path in at_place.items() if is_same(path, records[name])}
    if len(scans) < len(records):
        contents = {records[name].sha256: path for name, path in scans.items()}
        contents |= {_content(path): path for path in given.found if path not in scans.values()}
        scans = {name: contents[one.sha256] for name, one in records.items() if one.sha256 in contents} | scans
    scans |= _by_name([case for case in cases if case.name not in records], records, given.found, set(scans.values()))
    changed = [path for path in at_place.values() if path not in scans.values()]
    used = {*scans.values(), *changed}
    return Matched(scans, changed, [path for path in given.found if path not in used])


def _by_name(
    cases: Sequence[Path], others: Mapping[str, FileRecord], images: Sequence[Path], used: set[Path]
) -> dict[str, Path]:
    """Match cases whose result does not record its scan by file names that are of one case and of one image."""
    runs = {case.name: read_run(case) for case in cases}
    names = {name: run.inputs.query.file for name, run in runs.items() if run is not None and run.inputs.query}
    count = Counter([*names.values(), *(one.file for one in others.values())])
    free = [path for path in images if path not in used]
    matches = {name: [path for path in free if path.name == file] for name, file in names.items()}
    return {name: paths[0] for name, paths in matches.items() if len(paths) == count[names[name]] == 1}


def _content(path: Path) -> str:
    try:
        return file_record(path).sha256
    except (OSError, InputError):
        return ""


def _walk(folder: Path, scans: Scans, labels: bool, above: Sequence[str], bids: bool) -> None:
    """Take the scans of a folder and of those below; ``above`` are the real paths of the folders on the way."""
    place = os.path.realpath(folder)
    if place in above:
        scans.leave(folder, "a link to a folder above it")
        return
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        if not above:
            raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); check the permissions") from None
        scans.leave(folder, f"cannot be read ({error.strerror})")
        return
    names = {entry.name for entry in entries}
    if above and (reason := _foreign(folder, names, labels, bids)):
        scans.leave(folder, reason)
        return
    if "dataset_description.json" in names or any(name.startswith("sub-") for name in names):
        bids = True
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    images = [entry for entry in files if image_suffix(entry)]
    stems = {image_stem(entry) for entry in images}
    for image in images:
        if image.suffix.lower() == ".hdr" and {image.stem + ".img", image.stem + ".IMG"} & names:
            continue  # the other file of a pair
        if not labels and (reason := _no_scan(image, stems)):
            scans.leave(image, reason)
        else:
            scans.take(image)
    _take_dicom(folder, [entry for entry in files if not image_suffix(entry)], scans, labels, named=not above)
    for entry in folders:
        if len(above) + 1 >= _MOST_LEVELS:
            scans.leave(entry, f"more than {_MOST_LEVELS} folders deep")
        else:
            _walk(entry, scans, labels, [*above, place], bids)


def _foreign(folder: Path, names: set[str], labels: bool, bids: bool) -> str:
    """Why a folder below the one that was named holds no queries; empty if it may."""
    if STATUS in names or RUN in names:
        return "a result of this program"
    if len(ONE_ATLAS_NAMES & names) >= len(ONE_ATLAS_NAMES) - 1:
        return "a context of this program"
    if bids and folder.name in _BIDS_OTHERS:
        return "a BIDS folder without anatomical scans"
    if not labels and _LABEL_FOLDER.fullmatch(folder.name):
        return "a folder of label maps, by its name"
    return ""


def _no_scan(image: Path, stems: set[str]) -> str:
    """Why an image file is no query; empty if it may be one. What cannot be read is left to who reads it."""
    if image.name.lower().endswith(SEGMENTATION_SUFFIX):
        return "a label map, by its ending"
    match = _NNUNET_IMAGE.fullmatch(image_stem(image))
    if match and match[2] != "0000" and f"{match[1]}_0000" in stems:
        return "a further channel of a scan"
    if _LABEL_WORD.search(image_stem(image)):
        return "a label map, by its name"
    if image_suffix(image) in NIFTI_SUFFIXES and image.is_file():
        try:
            header: Any = nib.load(image).header
        except Exception:  # noqa: BLE001  (nibabel raises a dozen kinds on damaged files)
            return ""
        if int(header["intent_code"]) == _INTENT_LABEL:
            return "a label map, by its header"
    return ""


def _take_dicom(folder: Path, files: list[Path], scans: Scans, labels: bool, *, named: bool) -> None:
    """Take a folder with DICOM images as one scan; other files are left out."""
    try:
        dicom = [file for file in files if file.is_file() and (file.suffix.lower() == ".dcm" or is_dicom(file))]
    except InputError as error:
        scans.leave(folder, str(error))
        return
    for file in files:
        if file not in dicom:
            scans.leave(file, _NO_IMAGE)
    if not dicom:
        return
    try:
        found = modalities_in(dicom)
    except AtlasSegError:
        found = {SCAN_MODALITIES[0]}  # reading it says what is wrong
    if found & set(SCAN_MODALITIES):
        scans.take(folder, named=named)
    elif labels:
        for file in dicom:
            scans.take(file)
    else:
        scans.leave(folder, f"DICOM files without a scan ({listed(sorted(found))})")
