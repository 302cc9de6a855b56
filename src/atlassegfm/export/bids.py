"""Results as derivatives of a BIDS dataset.

::

    derivatives/atlassegfm/
        dataset_description.json
        README.md
        dseg.tsv, dseg.json            structures and metadata of all label maps below
        sub-01/ses-1/anat/
            sub-01_ses-1_space-orig_desc-atlassegfm_dseg.nii.gz
            sub-01_ses-1_space-orig_desc-atlassegfm_dseg.json

The scans are those of the dataset, known by the entities in their file names. "orig" is BIDS's word for the voxels of
the scan itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.bids import BidsName
from ..core.errors import InputError
from ..core.files import output_folder, replaced_folder, write_json
from ..core.image import image_suffix, save_volume
from ..core.labels import Structure
from ..core.text import counted
from ..core.version import __version__
from .results import Found, Result, none_left, structures_of_all, told

DESCRIPTION, LOOKUP, COMMON = "dataset_description.json", "dseg.tsv", "dseg.json"
#: Of the specification whose rules are followed.
_BIDS_VERSION = "1.10.0"
_PAPER = "https://arxiv.org/abs/2512.18176"
#: Metadata of all label maps: BIDS lets files inherit from those above them.
_METADATA = {"Description": "Structures of an annotated scan, found in this one", "SpatialReference": "orig"}


@dataclass
class Derivatives:
    """What was written, and what was not."""

    folder: Path
    files: list[str] = field(default_factory=list)  # label maps, in the folder
    left_out: dict[str, str] = field(default_factory=dict)  # why, by name of the result

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {"folder": str(self.folder), "files": self.files, "left_out": self.left_out}

    def lines(self) -> list[str]:
        """Describe it for people."""
        return [f"{counted(len(self.files), 'label map')} -> {self.folder}  ({len(self.left_out)} left out)"]


def write_bids(
    found: Found, folder: Path, *, on_case: Callable[[int, int, str], None] = lambda *_: None
) -> Derivatives:
    """Write results as derivatives of the BIDS dataset that their scans are from; whole or not at all.

    ``on_case`` is called with number, count and name before each case. InputError if the folder exists or cannot be
    written, two files would have one name, or no result is left.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already and is not replaced; choose another folder, or move it away")
    structures = structures_of_all(found.results)
    done = Derivatives(folder, left_out=dict(found.left_out))
    roots = {result.name: root for result in found.results if (root := root_of(result.scan)) is not None}
    datasets = sorted(set(roots.values()))
    # URIs of the scans are given where the folder lies in their dataset: another path could name patients.
    linked = len(datasets) == 1 and folder.resolve().is_relative_to(datasets[0].resolve())
    targets = dict[str, Result]()
    with output_folder(folder.parent), replaced_folder(folder, frozenset()) as new:
        for number, result in enumerate(found.results, start=1):
            on_case(number, len(found.results), result.name)
            if result.name not in roots:
                done.left_out[result.name] = "its scan has no BIDS name, or does not lie in the folder of its subject"
                continue
            source = PurePosixPath(result.scan.absolute().relative_to(roots[result.name]).as_posix())
            target = source.with_name(BidsName.of(result.scan).derived("atlassegfm", "dseg"))
            if (other := targets.setdefault(str(target), result)) is not result:
                both = f"the scans of {other.name} and {result.name} would both give {target.name}.nii.gz"
                raise InputError(f"{folder}: {both}; segment one kind of scan a folder, with --entities")
            try:
                _, labels = result.read()
            except InputError as error:
                done.left_out[result.name] = told(error)
                continue
            (new / target).parent.mkdir(parents=True, exist_ok=True)
            save_volume(labels, new / f"{target}.nii.gz", structures=structures)
            sources = {"Sources": [f"bids:raw:{source}"]} if linked else {}
            write_json(new / f"{target}.json", {**sources, **_sidecar(result)})
            done.files.append(f"{target}.nii.gz")
        if not done.files:
            raise none_left(folder, done.left_out)
        links = {"raw": Path(os.path.relpath(datasets[0].resolve(), folder.resolve())).as_posix()} if linked else {}
        write_json(new / DESCRIPTION, _description(datasets, links))
        write_json(new / COMMON, {**_METADATA, "Manual": False})
        (new / LOOKUP).write_text(_lookup(structures), encoding="utf-8")
        (new / "README.md").write_text(_readme(len(done.files)), encoding="utf-8")
    return done


def root_of(scan: Path) -> Path | None:
    """Find the dataset of a scan: the folder with its ``sub-LABEL``; None if it lies in none."""
    name = BidsName.of(scan)
    if not name.entities or image_suffix(scan) is None:
        return None
    subject = f"sub-{name.entities['sub']}"
    return next((folder.parent for folder in scan.absolute().parents if folder.name == subject), None)


def _sidecar(result: Result) -> dict[str, Any]:
    """Metadata of one label map: how it was made, and what is thought of each structure."""
    rows = []
    for one in result.run.structures:
        quality = one.quality
        judged = {} if quality is None else {"Verdict": quality.verdict, "EstimatedDice": quality.estimated_dice}
        rows.append({"Index": one.value, "Name": one.name, "Status": one.status, "VolumeMl": one.volume_ml, **judged})
    made = {"GeneratedByVersion": result.run.versions.get("atlassegfm", ""), "Model": result.run.model.name}
    return {**made, "Verdict": result.run.verdict, "Structures": rows}


def _description(datasets: Sequence[Path], links: dict[str, str]) -> dict[str, Any]:
    """Content of ``dataset_description.json``, with names and DOIs of the raw datasets."""
    raw = [_read_json(root / DESCRIPTION) for root in datasets]
    names = [str(one["Name"]) for one in raw if one.get("Name")]
    sources = [{"DOI": one["DatasetDOI"]} for one in raw if one.get("DatasetDOI")]
    return {
        "Name": f"Segmentations of {', '.join(names)}" if names else "Segmentations",
        "BIDSVersion": _BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "AtlasSegFM", "Version": __version__, "Description": "One annotated scan as atlas"}],
        **({"SourceDatasets": sources} if sources else {}),
        **({"DatasetLinks": links} if links else {}),
        "HowToAcknowledge": f"Please cite {_PAPER}",
    }


def _read_json(path: Path) -> dict[str, Any]:
    """Read a description of another program, as far as it can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lookup(structures: Sequence[Structure]) -> str:
    rows = ["index\tname\tcolor"]
    for one in structures:
        name = " ".join(one.name.split())  # a tab would be another column
        rows.append(f"{one.value}\t{name}\t#{bytes(one.color).hex()}")
    return "\n".join(rows) + "\n"


def _readme(count: int) -> str:
    return (
        f"# Segmentations\n\n{counted(count, 'label map')} that AtlasSegFM made from one annotated scan. `{LOOKUP}` "
        "has the label values. The JSON file beside each has a verdict on every structure, estimated without a label: "
        "`good`, `review` or `failed`; `accepted` where a person looked at it.\n"
    )
