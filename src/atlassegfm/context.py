"""Context: an atlas with its settings and trained gate, kept as one folder for all queries.

- ``atlas.nii.gz`` and ``labels.nii.gz``: the annotated scan in RAS-canonical array order, with names in the label map;
- ``settings.toml``: all settings, as ``--config`` reads them;
- ``context.toml``: format and program version, names of the source files, structures, grid, model, gate;
- ``correction.npz``: network of the default gate;
- ``SHA256SUMS``: checksums of the others, as ``sha256sum -c`` reads them.

The same input gives the same files. No folder of a source file is written: it may name a patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from .atlas import Atlas, is_same_scan
from .core.config import gate_settings, load_toml, to_toml, with_file
from .core.device import memory_errors, reproducible, resolve_device
from .core.errors import InputError, ModelError
from .core.files import PathLike, replaced_folder
from .core.geometry import Grid
from .core.image import ImageLike, Volume, load_volume, save_volume, smallest_label_type
from .core.labels import Structure
from .core.progress import GATE_STEPS, StageClock, stage_printer
from .core.version import __version__
from .dicom import EVERYTHING, Selection
from .fusion.correction import Correction
from .fusion.gate import Gate
from .fusion.train import train_gate_on_atlas
from .models.base import Ensemble, Models
from .models.table import load_chosen, prompt_kind
from .models.weights import sha256_of
from .prompts import PromptKind
from .settings import NO_MODEL, Settings

#: Format of the folder: raised when its files change, or what a gate is trained on.
FORMAT = 6
ATLAS, LABELS, CORRECTION = "atlas.nii.gz", "labels.nii.gz", "correction.npz"
SETTINGS, CONTENT, CHECKSUMS = "settings.toml", "context.toml", "SHA256SUMS"
#: Atlases of a context: each is registered to every query.
_MOST_ATLASES = 20
#: Files of further atlases, from the second on.
_OTHERS = tuple((f"atlas-{n}.nii.gz", f"labels-{n}.nii.gz") for n in range(2, _MOST_ATLASES + 1))
#: A folder with any other file is never replaced. The correction is there only if the gate has one.
ONE_ATLAS_NAMES = frozenset({ATLAS, LABELS, SETTINGS, CONTENT, CORRECTION, CHECKSUMS})
CONTEXT_NAMES = ONE_ATLAS_NAMES | {name for two in _OTHERS for name in two}
_MAKE_AGAIN = "make it again with atlassegfm customize"


@dataclass(frozen=True)
class SavedContext:
    """A context folder and the SHA-256 of its list of checksums, which covers every file in it."""

    folder: Path
    sha256: str


@dataclass(frozen=True)
class Expected:
    """What a structure scores on atlases that were segmented from the others of their context."""

    dice: float  # mean over the atlases that have it
    lowest: float
    surplus: float  # mean of the Dice less its estimate; 0 where nothing was estimated
    cases: int  # atlases that have it


@dataclass(frozen=True, eq=False, repr=False)
class Context:
    """An atlas with its settings and, once trained, the gate.

    ``settings`` are those of the gate, and the defaults for queries. ``gate`` is None before training, or without a
    model; ``weights_sha256`` is that of the model's weights, empty where it has none or they are on a server;
    ``version`` that of this package when the gate was trained. ``saved`` is the folder it was read from, ``files`` are
    the file names of the atlas by role ("atlas", "labels"). ``others`` are further
    atlases, whose structures are those of the first; some may lack voxels of some. ``expected`` is by name of the
    structure what it scores on them, empty where that was not measured (:mod:`.leave_one_out`).
    """

    atlas: Atlas
    settings: Settings = field(default_factory=Settings)
    gate: Gate | None = None
    weights_sha256: str = ""
    version: str = __version__
    saved: SavedContext | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Atlas, ...] = ()
    expected: Mapping[str, Expected] = field(default_factory=dict)

    @property
    def atlases(self) -> tuple[Atlas, ...]:
        """All atlases, the first one first."""
        return self.atlas, *self.others

    def with_atlas(self, other: Atlas, name: str = "the atlas", files: Mapping[str, str] | None = None) -> Context:
        """Add an atlas, whose structures are among those of the first one by name; the gate stays.

        ``files`` are its file names by role, "atlas" and "labels". Raises InputError, with the ``name`` of the atlas,
        if it has a structure that the first does not have, or is one of the context's already.
        """
        if len(self.atlases) == _MOST_ATLASES:
            raise InputError(f"{name}: the context has {_MOST_ATLASES} atlases, which is the most")
        if any(is_same_scan(other.image, one.image) for one in self.atlases):
            raise InputError(f"{name}: is the same scan as another atlas; give each once")
        matched = other.matched(self.atlas, name)
        number = len(self.atlases) + 1
        own = {f"{role} {number}": file for role, file in (files or {}).items()}
        others, files = (*self.others, matched), {**self.files, **own}
        return replace(self, others=others, files=files, saved=None, expected={})

    def without_atlas(self, number: int) -> Context:
        """Remove an atlas by its number, from 2 on: the gate was trained on the first. InputError if there is none."""
        if not 2 <= number <= len(self.atlases):
            known = f"2 to {len(self.atlases)}" if self.others else "none: there is only the first"
            raise InputError(f"{self._name}: no atlas {number} that can be removed; expected {known}")
        others = tuple(one for n, one in enumerate(self.others, start=2) if n != number)
        files = {}
        for role, file in self.files.items():
            kind, _, its = role.partition(" ")
            place = int(its or 1)
            if place != number:
                files[kind if place == 1 else f"{kind} {place - (place > number)}"] = file
        return replace(self, others=others, files=files, saved=None, expected={})

    def leaving_out(self, number: int) -> Context | None:
        """Leave an atlas out for one query: None if no other one has all structures.

        Without the first, the next one that has all structures takes its place, and there is no gate: it was trained
        on the first. Nothing is ``expected``: that comes from the labels of all atlases.
        """
        if number != 1:
            others = tuple(one for n, one in enumerate(self.others, start=2) if n != number)
            return replace(self, others=others, expected={})
        first = next((one for one in self.others if one.present == one.values), None)
        if first is None:
            return None
        others = tuple(one for one in self.others if one is not first)
        return replace(self, atlas=first, others=others, gate=None, expected={})

    @classmethod
    def from_files(
        cls,
        image: ImageLike,
        labels: ImageLike,
        names: PathLike | None = None,
        *,
        settings: Settings | None = None,
        series: str | None = None,
        selection: Selection = EVERYTHING,
    ) -> Context:
        """Read an annotated scan; parameters as of :meth:`Atlas.from_files`. The gate is not trained yet."""
        atlas = Atlas.from_files(image, labels, names, series=series, selection=selection)
        sources = {"atlas": atlas.image.source, "labels": atlas.labels.source}
        files = {role: source.path.name for role, source in sources.items() if source is not None}
        return cls(atlas, settings or Settings(), files=files)

    @property
    def prompt(self) -> PromptKind | None:
        """Kind of prompt of the model; None without a model."""
        return prompt_kind(self.settings)

    def __repr__(self) -> str:
        """Atlas, model and gate, on a few lines."""
        gate = "not trained" if self.gate is None else self.gate.describe()
        return f"Context({self.atlas!r}, model {self.settings.model}, gate: {gate})"

    def check_settings(self, settings: Settings) -> None:
        """Check that a trained gate fits the settings: InputError, naming the first that differs, where not."""
        if settings.model == NO_MODEL or (self.gate is None and self.saved is None):
            return
        made = _gate_basis(self.settings)
        for key, asked in _gate_basis(settings).items():
            if asked != made.get(key):
                found = f"made with {key} = {made.get(key)}, but {asked} was asked for"
                advice = "leave it as it is, or make a context with it by atlassegfm customize"
                raise InputError(f"{self._name}: {found}; {advice}")

    def check_model(self, model: Models | None) -> None:
        """Check that the model has the weights the gate was trained with, where both are known; ModelError if not."""
        found = _weights_sha256(model)
        if found and self.weights_sha256 and found != self.weights_sha256:
            sums = f"SHA-256 {self.weights_sha256[:12]}..., found {found[:12]}..."
            raise ModelError(
                f"{self._name}: made with other weights of the model {self.settings.model!r} ({sums}); name those with "
                "--model-path, or make a context with these by atlassegfm customize"
            )

    def save(self, folder: PathLike) -> SavedContext:
        """Write the context folder, whose parent exists, whole or not at all; an earlier one is replaced.

        Raises InputError if it cannot be written, or holds anything but a context.
        """
        folder = Path(folder)
        image, labels = self.atlas.image, self.atlas.labels
        with replaced_folder(folder, CONTEXT_NAMES) as new:
            # Without their sources: headers of the original files may identify the patient.
            save_volume(Volume(image.data, image.grid), new / ATLAS)
            save_volume(Volume(labels.data, labels.grid), new / LABELS, structures=self.atlas.structures)
            for one, (image_name, labels_name) in zip(self.others, _OTHERS, strict=False):
                save_volume(Volume(one.image.data, one.image.grid), new / image_name)
                save_volume(Volume(one.labels.data, one.labels.grid), new / labels_name, structures=one.structures)
            # The path of the weights is this machine's.
            _write(new / SETTINGS, to_toml(replace(self.settings, model_path="")))
            _write(new / CONTENT, self._content())
            if self.gate is not None and self.gate.correction is not None:
                # Uncompressed arrays: read back without pickles, and the same bytes from the same arrays.
                np.savez(new / CORRECTION, allow_pickle=False, **self.gate.correction.arrays())
            names = sorted(name for name in CONTEXT_NAMES if (new / name).exists())
            _write(new / CHECKSUMS, "".join(f"{sha256_of(new / name)}  {name}\n" for name in names))
            sha256 = sha256_of(new / CHECKSUMS)
        return SavedContext(folder, sha256)

    @classmethod
    def load(cls, folder: PathLike) -> Context:
        """Read a context folder that :meth:`save` or ``atlassegfm customize`` wrote.

        Raises InputError if it is none, is incomplete or damaged, or has another format.
        """
        folder = Path(folder)
        content, sha256 = _checked_content(folder)
        version = str(content.get("atlassegfm", "unknown"))
        try:
            settings = with_file(Settings(), folder / SETTINGS)
        except InputError as error:
            raise InputError(f"{error} ({folder} was made by version {version}: {_MAKE_AGAIN})") from None
        try:
            return cls(
                _read_atlas(folder, content),
                settings,
                _read_gate(content, folder / CORRECTION) if "gate" in content else None,
                content["model"]["weights_sha256"],
                version,
                SavedContext(folder, sha256),
                dict(content["files"]),
                _read_others(folder, content),
                TypeAdapter(dict[str, Expected]).validate_python(content.get("expected", {})),
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{folder / CONTENT}: damaged, though its checksum is right; {_MAKE_AGAIN}") from None

    @property
    def _name(self) -> str:
        return "the context" if self.saved is None else str(self.saved.folder)

    def _content(self) -> str:
        """Text of ``context.toml``."""
        import tomli_w

        grid = self.atlas.image.grid
        model = {"name": self.settings.model, "prompt": self.prompt, "weights_sha256": self.weights_sha256}
        content: dict[str, Any] = {
            "format": FORMAT,
            "atlassegfm": self.version,
            "files": dict(self.files),
            "model": {key: value for key, value in model.items() if value is not None},
            # Headers of NIfTI files have 32 bits; results must be those of the atlas that was read.
            "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        }
        if self.gate is not None:
            gate = asdict(replace(self.gate, correction=None))
            content["gate"] = {name: value for name, value in gate.items() if name not in ("correction", "mixture")}
            if self.gate.mixture:
                content["mixture"] = {name: list(weights) for name, weights in self.gate.mixture.items()}
        if self.others:
            grids = (one.image.grid for one in self.others)
            content["others"] = [{"shape": list(grid.shape), "affine": grid.affine.tolist()} for grid in grids]
        if self.expected:
            content["expected"] = {name: asdict(one) for name, one in self.expected.items()}
        content["structures"] = [asdict(one) for one in self.atlas.structures]
        return tomli_w.dumps(content)


def customize(
    context: Context,
    *,
    device: str = "auto",
    model: Models | None = None,
    on_stage: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Context:
    """Train the gate of a context on simulated registration errors of its atlas; without a model it stays as it was.

    ``device`` is "auto", "cpu" or "cuda"; ``model`` the one that the settings name, if it is loaded already.
    ``on_stage`` is called with the name of the stage, and of its parts: each structure, then each step of the training;
    ``progress`` prints them to standard error. Raises InputError if a setting cannot be used, ModelError if model or
    device cannot do what was asked.
    """
    settings, device = context.settings, resolve_device(device)
    model = None if prompt_kind(settings) is None else model or load_chosen(settings, device)
    if model is None:
        return context
    show = on_stage or (stage_printer(GATE_STEPS) if progress else None)
    with memory_errors(), StageClock(show).stage("gate") as report:
        return train_context(context, model, settings, device=device, on_part=report)


def train_context(
    context: Context,
    model: Models,
    settings: Settings,
    *,
    device: str = "cpu",
    on_part: Callable[[str], None] = lambda _: None,
) -> Context:
    """Train the gate in a random state of its own: it does not depend on what was computed before."""
    prompt = prompt_kind(settings)
    if prompt is None:
        return context
    with reproducible(settings.seed):
        gate = train_gate_on_atlas(context.atlas, model, prompt, settings, device=device, on_part=on_part)
    return replace(context, settings=settings, gate=gate, weights_sha256=_weights_sha256(model), version=__version__)


def _gate_basis(settings: Settings) -> dict[str, Any]:
    """What a trained gate depends on, model and prompt first."""
    return {"model": settings.model, "prompt": prompt_kind(settings), **gate_settings(settings)}


def _weights_sha256(model: Models | None) -> str:
    """SHA-256 of the weights, where the model reports it; of several models with a comma between them."""
    members = model.members.values() if isinstance(model, Ensemble) else () if model is None else (model,)
    weights = (member.provenance.get("weights") for member in members)
    return ",".join(str(one["sha256"]) for one in weights if isinstance(one, Mapping) and one.get("sha256"))


def _checked_content(folder: Path) -> tuple[dict[str, Any], str]:
    """Content of ``context.toml`` and checksum of the list of checksums, after comparing all files with theirs."""
    path, again = folder / CHECKSUMS, f"copy the whole folder again, or {_MAKE_AGAIN}"
    if not (path.exists() or (folder / CONTENT).exists()):
        found = "is a file" if folder.is_file() else f"has no {CONTENT}" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}; expected a context folder, as atlassegfm customize writes one")
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in path.read_text(encoding="ascii").splitlines())
    except FileNotFoundError:
        raise InputError(f"{path}: missing from the context; {again}") from None
    except (ValueError, OSError):
        listed = {}
    for name, expected in sorted(listed.items()):
        file = folder / name
        if file.name != name:
            raise InputError(f"{path}: damaged, it names {name!r}; {again}")
        try:
            found = sha256_of(file)
        except FileNotFoundError:
            raise InputError(f"{file}: missing from the context; {again}") from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); check the permissions") from None
        if found != expected:
            sums = f"its SHA-256 is {found[:12]}..., expected {expected[:12]}..."
            raise InputError(f"{file}: damaged or changed, {sums}; {again}")
    content = load_toml(folder / CONTENT, "a context") if CONTENT in listed else {"format": FORMAT}
    if content.get("format") != FORMAT:
        raise InputError(
            f"{folder}: a context in the format {content.get('format')} of version {content.get('atlassegfm')}, but "
            f"this version ({__version__}) reads the format {FORMAT}; {_MAKE_AGAIN}, or use that version"
        )
    grids: Any = content.get("others", ())
    others = {name for two in _OTHERS[: len(grids)] for name in two}
    if listed.keys() | {CORRECTION} != ONE_ATLAS_NAMES - {CHECKSUMS} | others:
        raise InputError(f"{path}: damaged; {again}")
    return content, sha256_of(path)


def _read_atlas(folder: Path, content: Mapping[str, Any]) -> Atlas:
    """The first atlas of a folder whose checksums are right."""
    return _read_volumes(folder / ATLAS, folder / LABELS, content["grid"], content)


def _read_others(folder: Path, content: Mapping[str, Any]) -> tuple[Atlas, ...]:
    """The further atlases of a folder whose checksums are right."""
    grids = content.get("others", ())
    return tuple(
        _read_volumes(folder / image, folder / labels, grid, content)
        for grid, (image, labels) in zip(grids, _OTHERS, strict=False)
    )


def _read_volumes(image_path: Path, labels_path: Path, stored: Mapping[str, Any], content: Mapping[str, Any]) -> Atlas:
    image, labels = load_volume(image_path), load_volume(labels_path)
    i, j, k = stored["shape"]
    grid = Grid((i, j, k), np.array(stored["affine"]))
    structures = TypeAdapter(tuple[Structure, ...]).validate_python(content["structures"])
    kind = smallest_label_type(max(one.value for one in structures))
    return Atlas(
        Volume(np.ascontiguousarray(image.data, dtype=np.float32), grid),
        Volume(np.ascontiguousarray(labels.data, dtype=kind), grid),
        structures,
    )


def _read_gate(content: Mapping[str, Any], correction: Path) -> Gate:
    values: dict[str, Any] = {n: tuple(one) if isinstance(one, list) else one for n, one in content["gate"].items()}
    values["mixture"] = {name: tuple(weights) for name, weights in content.get("mixture", {}).items()}
    if not correction.exists():
        return Gate(**values)
    with np.load(correction, allow_pickle=False) as arrays:
        return Gate(**values, correction=Correction.from_arrays(arrays))


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # the same line ends on every system
