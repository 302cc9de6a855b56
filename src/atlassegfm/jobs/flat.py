"""Results in one folder, as nnU-Net writes its predictions."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError
from ..core.files import atomic_path, output_folder, write_json
from ..records import SEGMENTATION
from .table import read_run
from .work import SegmentWork


def write_flat(names: Sequence[str], work: SegmentWork, folder: Path) -> None:
    """Copy each segmentation to ``CASE.nii.gz``, with a ``dataset.json`` of the label values; else InputError."""
    labels = {"background": 0}
    with output_folder(folder):
        for name in names:
            run = read_run(work.out / name)
            if run is None:
                raise InputError(f"{work.out / name}: run.json cannot be read; segment again with --force")
            labels |= {one.name: one.value for one in run.structures}
            with atomic_path(folder / f"{name}.nii.gz") as temporary:
                shutil.copyfile(work.out / name / SEGMENTATION, temporary)
        if names:
            write_json(folder / "dataset.json", {"labels": labels, "file_ending": ".nii.gz"})
