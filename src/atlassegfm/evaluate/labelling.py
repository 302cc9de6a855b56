"""Label maps of results and references, read so that one structure has one label value and one name on both sides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import dicom
from ..core.errors import InputError
from ..core.image import Volume, label_values, load_labels, load_volume, smallest_label_type
from ..core.labels import LabelTable, dataset_json_of, listed, pick_values, plain_name, read_names_file, structures_of
from .pairing import RESULT_FILE, FilePair
from .scores import check_grids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DicomInputs:
    """How to read RTSTRUCT and DICOM-SEG files."""

    scan: Path | None = None  # image file or series folder they lie on; default: the other side, if an image file
    series: str | None = None  # which series of the folder
    selection: dicom.Selection = dicom.EVERYTHING  # which structures, and their names


class PairReader:
    """Reads pairs of label maps; structures of DICOM files get values by name, the user's ``names`` first."""

    def __init__(self, dicom: DicomInputs, names: LabelTable | None = None) -> None:
        self.names = names
        self._dicom = dicom
        self._reported: set[Path] = set()
        #: Values of structures that the other side does not have, the same for all pairs.
        self._values: dict[str, int] = {}
        self._dataset_names: dict[Path, LabelTable] = {}

    def read(self, pair: FilePair) -> tuple[Volume, Volume]:
        """Read result and reference; :class:`.InputError` if a file or an option for DICOM files cannot be used."""
        paths = (pair.result, pair.reference)
        foreign = [dicom.is_dicom_input(path) for path in paths]
        scan = self._scan if any(foreign) else None
        if not any(foreign) and (self._dicom.scan is not None or self._dicom.selection != dicom.EVERYTHING):
            raise InputError(
                f"{pair.result}, {pair.reference}: neither is an RTSTRUCT or DICOM-SEG, which --scan, --structures, "
                "--synonyms and --overlap are for; leave them out (--labels says what to score)"
            )
        if all(foreign) and scan is None:
            both = f"{pair.result}, {pair.reference}"
            raise InputError(f"{both}: both are DICOM objects; give the scan they lie on with --scan")
        images = [None if foreign[n] else load_labels(path, allow_empty=True) for n, path in enumerate(paths)]
        result, reference = (
            self._read_dicom(path, other if scan is None else scan) if image is None else image
            for path, image, other in zip(paths, images, reversed(images), strict=True)
        )
        # Values in DICOM files are those of the program that wrote them.
        if foreign[0]:
            result = self._renumbered(result, self.table(reference, pair.reference))
        elif foreign[1]:
            reference = self._renumbered(reference, self.table(result, pair.result))
        return result, reference

    def table(self, volume: Volume, path: Path) -> LabelTable:
        """Get the names in a file's header, then those of the dataset.json of its folder."""
        own = {} if volume.source is None else volume.source.label_table
        dataset = dataset_json_of(path)
        if dataset is None:
            return own
        if dataset not in self._dataset_names:
            try:
                self._dataset_names[dataset] = read_names_file(dataset)
            except InputError as error:
                # The user did not name this file: it may have regions, or belong to something else.
                logger.warning("%s; its names are not used", error)
                self._dataset_names[dataset] = {}
        return {**self._dataset_names[dataset], **own}

    @cached_property
    def _scan(self) -> dicom.Series | Volume | None:
        path = self._dicom.scan
        if path is None:
            return None
        return dicom.find_series(path, self._dicom.series)[0] if dicom.is_series_folder(path) else load_volume(path)

    def _read_dicom(self, path: Path, scan: dicom.Series | Volume | None) -> Volume:
        volume = dicom.open_labels(path, scan, self._dicom.selection, warn=path not in self._reported)
        self._reported.add(path)
        return volume

    def _renumbered(self, volume: Volume, other: LabelTable) -> Volume:
        """Label map with the values of the user's names, then of the other side's; unchanged if both are empty."""
        source, table = volume.source, {**other, **(self.names or {})}
        if not table or source is None:
            return volume
        by_name = {plain_name(entry.name): value for value, entry in sorted(table.items(), reverse=True)}
        lookup = np.zeros(int(max(source.label_table)) + 1, np.int64)
        entries = {}
        for value, entry in sorted(source.label_table.items()):
            name = plain_name(entry.name)
            if (wanted := by_name.get(name, self._values.get(name))) is None:
                taken = {*table, *self._values.values()}
                wanted = self._values[name] = value if value not in taken else max(taken) + 1
            lookup[value] = wanted
            entries[wanted] = entry
        data = lookup.astype(smallest_label_type(int(lookup.max())))[volume.data]
        return Volume(data, volume.grid, dicom.DicomSource(source.path, None, entries, source.notes))


def find_structures(
    pairs: Sequence[FilePair], reader: PairReader, *, strict: bool
) -> tuple[dict[int, str], dict[str, str]]:
    """Name each label value that results or references of the pairs (at least one) have, among those to be scored.

    The second dict says by case why a pair cannot be scored: unusable files or different grids. An
    :class:`.InputError` if none can be scored, all voxels are 0, a name has another value on the other side, or
    (``strict``) both sides have other structures.
    """
    present: tuple[set[int], set[int]] = (set(), set())
    tables: list[LabelTable] = [{}, {}]
    failures: dict[str, str] = {}
    for pair in pairs:
        try:
            volumes = reader.read(pair)
            check_grids(*volumes)
        except InputError as error:
            failures[pair.case] = str(error)
            continue
        for side, (volume, path) in enumerate(zip(volumes, (pair.result, pair.reference), strict=True)):
            present[side].update(label_values(volume.data))
            tables[side] = {**reader.table(volume, path), **tables[side]}
    if len(failures) == len(pairs):
        raise InputError(listed([*dict.fromkeys(failures.values())], 3, "; "))
    pairs = [pair for pair in pairs if pair.case not in failures]
    results, references = (_place([getattr(pair, role) for pair in pairs]) for role in ("result", "reference"))
    if reader.names is None:
        _check_values(tables[0], tables[1], results, references)
    values = present[0] | present[1]
    if not values:
        raise InputError(f"{results}: no structure here or in {references} (all voxels are 0); give the right files")
    names = {one.value: one.name for one in structures_of(values, [reader.names or {}, tables[1], tables[0]])}
    # What a side's own table names may be absent from its voxels.
    extra = sorted(present[0] - present[1] - tables[1].keys())
    lacking = sorted(present[1] - present[0] - tables[0].keys())
    differences = [
        f"{one} has {listed([f'{value} ({names[value]})' for value in values])}, which {other} lacks"
        for values, one, other in ((extra, results, references), (lacking, references, results))
        if values
    ]
    if strict and differences:
        raise InputError(
            f"{'; '.join(differences)}: the label sets differ; say what to score with --labels "
            "(values or names with commas between, or '*' for all)"
        )
    return names, failures


def pick_structures(names: Mapping[int, str], wanted: Sequence[str]) -> dict[int, str]:
    """Pick structures by value, else name, else shell pattern; an :class:`InputError` where nothing matches."""
    return {value: names[value] for value in pick_values(names, wanted)}


def _place(paths: Sequence[Path]) -> str:
    """The file of one side, or the folder of its files."""
    levels = 0 if len(paths) == 1 else 2 if paths[0].name == RESULT_FILE else 1
    return str([paths[0], *paths[0].parents][levels])


def _check_values(result: LabelTable, reference: LabelTable, place: str, other: str) -> None:
    """Refuse label maps that give one name to different values: scores would compare two different organs."""
    values: dict[str, list[int]] = {}
    for value, entry in reference.items():
        values.setdefault(plain_name(entry.name), []).append(value)
    for value, entry in sorted(result.items()):
        others = values.get(plain_name(entry.name), [value])
        if value not in others:
            raise InputError(
                f"{place}: {entry.name!r} has the value {value}, but {min(others)} in {other}; "
                "renumber one of them, or give the right names with --names"
            )
