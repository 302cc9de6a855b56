"""Writing results: one folder for each query, whole or not at all.

A folder holds ``segmentation.nii.gz`` and ``run.json``; on request also

- ``atlas.nii.gz`` and ``model.nii.gz``: label maps of the warped atlas and of the model alone;
- ``probability.nii.gz``: fused probabilities, one volume for each structure in the order that ``run.json`` lists
  under ``probability``, as bytes with a scale of 1/255 in the header;
- ``report.html`` and ``overview.png``: written by :mod:`atlassegfm.report`, gone when the result is made again;
- ``transform/``: the map from query to atlas as ITK, ANTs, 3D Slicer and ``segment --transform`` read it; see
  :mod:`atlassegfm.itk`.

Names of files are kept in ``run.json``, their folders are not: paths in clinics name patients.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .context import Context
from .errors import InputError
from .image import Volume, save_volume
from .itk import write_transform
from .memory import peak_memory_mb
from .pipeline import Segmentation
from .settings import to_dict

#: What a report adds to a result folder; gone when the result is made again.
REPORT_NAMES = frozenset({"report.html", "overview.png"})
#: What a result folder may hold: a folder with anything else in it is never replaced.
RESULT_NAMES = frozenset(
    {
        *("segmentation.nii.gz", "run.json", "atlas.nii.gz", "model.nii.gz", "probability.nii.gz", "transform"),
        *REPORT_NAMES,
    }
)
#: Temporary folders beside results begin so; a killed process may leave one.
_TEMPORARY_PREFIX = ".writing-"


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What ``run.json`` says of the inputs.

    Parameters
    ----------
    context : Context
        The atlas.
    query : Volume
        As read from its file.
    transform : Path, optional
        The transform that was given instead of registering.
    """

    context: Context
    query: Volume
    transform: Path | None = None

    def summary(self) -> dict[str, Any]:
        """File names and the notes about their geometry."""
        volumes = {"atlas": self.context.image, "labels": self.context.labels, "query": self.query}
        files: dict[str, Any] = {
            role: {"file": volume.source.path.name, "notes": list(volume.source.notes)}
            for role, volume in volumes.items()
            if volume.source is not None
        }
        if self.transform is not None:
            files["transform"] = {"file": self.transform.name}
        return files


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make a folder for results, check that it can be written to, and remove it if it ends up empty.

    Raises
    ------
    InputError
        If it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            for folder in (*reversed(path.parents), path):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            with tempfile.TemporaryDirectory(dir=path, prefix=_TEMPORARY_PREFIX):
                pass
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{path}: a file is in the way, expected a folder for results; choose another") from None
        except OSError as error:
            raise InputError(f"{path}: cannot write there ({error.strerror}); choose another place") from None
        yield
    finally:
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_replaceable(path: Path, known: frozenset[str]) -> None:
    """Refuse to replace what this program did not write.

    Parameters
    ----------
    path : Path
        A folder to be written, which may exist.
    known : frozenset of str
        Names of the files and folders it may hold.

    Raises
    ------
    InputError
        If it is a file, or a folder with anything else in it.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: exists and is not a folder, but the result is to go there; move it away")
    if path.is_dir():
        try:
            foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); choose another output folder") from None
        if foreign:
            raise InputError(
                f"{path}: the result is to go there, but the folder holds other files ({foreign[0]}"
                f"{', ...' if len(foreign) > 1 else ''}); choose another output folder"
            )


@contextmanager
def replaced_folder(path: Path, known: frozenset[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; put it in its place if the block succeeds, delete it if not.

    Raises
    ------
    InputError
        As :func:`check_replaceable`, and if the disk refuses.
    """
    check_replaceable(path, known)
    with _disk_errors(path):
        holder = Path(tempfile.mkdtemp(dir=path.parent, prefix=_TEMPORARY_PREFIX))
    new, old = holder / "new", holder / "old"
    try:
        with _disk_errors(path):
            new.mkdir()
        yield new
        with _disk_errors(path):
            # A folder that is not empty cannot be replaced in one step: for a moment there is none.
            try:
                if path.exists():
                    os.replace(path, old)
                os.replace(new, path)
            finally:
                if old.exists() and not path.exists():
                    os.replace(old, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror or error}); choose another place") from None


def write_result(segmentation: Segmentation, inputs: RunInputs, folder: Path, *, keep: bool = False) -> dict[str, Any]:
    """Write the result of one query.

    Parameters
    ----------
    segmentation : Segmentation
        The result.
    inputs : RunInputs
        What it was made from.
    folder : Path
        The result folder; an earlier one is replaced. Its parent exists.
    keep : bool
        Whether to write the intermediate results too.

    Returns
    -------
    dict
        What was written to ``run.json``.

    Raises
    ------
    InputError
        If the folder cannot be written or holds something else.
    """
    structures = inputs.context.structures
    run = run_summary(segmentation, inputs)
    with replaced_folder(folder, RESULT_NAMES) as new, _disk_errors(folder):
        save_volume(segmentation.labels, new / "segmentation.nii.gz", structures=structures)
        if keep:
            save_volume(segmentation.atlas_labels, new / "atlas.nii.gz", structures=structures)
            if segmentation.model_labels is not None:
                save_volume(segmentation.model_labels, new / "model.nii.gz", structures=structures)
            _save_probabilities(segmentation, new / "probability.nii.gz")
            run["probability"] = [result.structure.name for result in segmentation.structures]
            found = segmentation.registration
            write_transform(new / "transform", found.linear, found.field, segmentation.grid, found.local)
        (new / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return run


def run_summary(segmentation: Segmentation, inputs: RunInputs) -> dict[str, Any]:
    """The content of ``run.json``."""
    summary = segmentation.summary()
    settings = to_dict(segmentation.settings)
    settings["model_path"] = Path(settings["model_path"]).name
    return {
        "inputs": inputs.summary(),
        **summary,
        "total_seconds": round(sum(segmentation.seconds.values()), 3),
        "peak_memory_mb": peak_memory_mb(),
        "settings": settings,
        "versions": {
            "atlassegfm": version(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch")},
        },
    }


def version() -> str:
    """Version of this package."""
    from . import __version__

    return __version__


def _save_probabilities(segmentation: Segmentation, path: Path) -> None:
    """(I, J, K, structures) uint8 with scale 1/255: a quarter of float32, and no tool needs more."""
    import nibabel as nib

    stored = segmentation.labels.grid
    data = np.zeros((*stored.shape, len(segmentation.structures)), np.uint8)
    for position, result in enumerate(segmentation.structures):
        maps = segmentation.probabilities.get(result.structure.value)
        if maps is not None:
            full = np.rint(maps.fused.to_full(segmentation.grid.shape) * 255).astype(np.uint8)
            data[..., position] = Volume(full, segmentation.grid).turned_to(stored).data
    image = nib.Nifti1Image(data, stored.affine)
    image.header.set_xyzt_units("mm")
    # nibabel takes a slope for a wish to be rescaled; set on the header it scales what it is given.
    image.header.set_slope_inter(1 / 255, 0)
    nib.save(image, path)
