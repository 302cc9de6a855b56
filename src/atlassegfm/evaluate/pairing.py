"""Pairs of files to compare: which result belongs to which reference."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..core.files import entries_of
from ..core.image import IMAGE_SUFFIXES, image_stem, image_suffix
from ..core.labels import listed

logger = logging.getLogger(__name__)

#: File of a result in the folder that ``segment`` writes for each query.
RESULT_FILE = "segmentation.nii.gz"
#: nnU-Net's mark of the first channel: a result of CASE_0000 belongs to the reference CASE.
_FIRST_CHANNEL = "_0000"


@dataclass(frozen=True)
class FilePair:
    """Label map, RTSTRUCT or DICOM-SEG of a result, and of its reference."""

    case: str  # name of the reference without its suffix
    result: Path
    reference: Path


def find_pairs(result: Path, reference: Path, *, partial: bool = False) -> list[FilePair]:
    """Match results to references, sorted by case.

    Both are files, or folders of files with the same names. Results may be in the folder that ``segment`` wrote, with a
    folder for each query; a result of CASE_0000 belongs to the reference CASE. References without a result are left out
    with a warning if ``partial``. An :class:`.InputError` if a path does not exist or only one is a folder, a folder
    has no label map, or a file has no counterpart.
    """
    for path, role in ((result, "results"), (reference, "references")):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; expected the {role}: check the path")
    if not result.is_dir() and not reference.is_dir():
        return [FilePair(image_stem(reference), result, reference)]
    if not (result.is_dir() and reference.is_dir()):
        folder, file = (result, reference) if result.is_dir() else (reference, result)
        raise InputError(f"{folder}: a folder, while {file} is a file; give two files or two folders")
    references = _label_files(reference, nested=False)
    results: dict[str, Path] = {}
    for stem, path in _label_files(result, nested=True).items():
        case = stem if stem in references else stem.removesuffix(_FIRST_CHANNEL)
        if case not in references:
            wanted = f"{case}.nii.gz or another image suffix"
            raise InputError(f"{path}: no reference in {reference}; expected {wanted}: add it, or remove the result")
        if case in results:
            raise InputError(f"{path}: belongs to the reference {case} as does {results[case]}; remove one")
        results[case] = path
    if missing := sorted(references.keys() - results.keys()):
        message = f"{result}: no result for {len(missing)} of {len(references)} references: {listed(missing, 5)}"
        if not partial:
            raise InputError(f"{message}; add them, or score the others alone with --partial")
        logger.warning("%s; they are not counted", message)
    return [FilePair(case, results[case], references[case]) for case in sorted(results)]


def _label_files(folder: Path, *, nested: bool) -> dict[str, Path]:
    """Label maps of a folder by name without suffix; ``nested``: also CASE/segmentation.nii.gz."""
    found: dict[str, Path] = {}
    for path in entries_of(folder):
        if path.is_dir():
            stem, file = path.name, path / RESULT_FILE
            wanted = nested and file.is_file()
        else:
            stem, file = image_stem(path), path
            wanted = image_suffix(path) is not None or path.suffix.lower() == ".dcm"
        if wanted and found.setdefault(stem, file) is not file:
            raise InputError(f"{file}: {found[stem]} has the same name; remove one")
    if not found:
        also = f", or folders with {RESULT_FILE}" if nested else ""
        raise InputError(f"{folder}: no label map; expected files ending in {', '.join(IMAGE_SUFFIXES)}{also}")
    return found
