"""What is made of an atlas once and used for every query: the atlas, the settings and the trained gate, as one folder.

A context folder holds

- ``atlas.nii.gz`` and ``labels.nii.gz``: the annotated scan in RAS-canonical array order, with names in the label map;
- ``settings.toml``: all settings, as ``--config`` reads them;
- ``context.toml``: format and program version, the names of the files it was made from, structures, grid, model, gate;
- ``SHA256SUMS``: checksums of the others, as ``sha256sum -c`` reads them.

It has no date in it: the same input gives the same files. Names of files are kept, their folders are not: paths in
clinics name patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .atlas import Atlas
from .core.config import load_toml, to_dict, to_toml, with_file
from .core.device import resolve_device
from .core.errors import InputError, ModelError
from .core.files import replaced_folder
from .core.geometry import Grid
from .core.image import Volume, load_volume, save_volume, smallest_label_type
from .core.labels import Structure
from .core.version import __version__
from .fusion.correction import Correction
from .fusion.gate import Gate
from .fusion.train import learn_gate
from .models import Segmenter
from .models.choice import load_chosen, prompt_kind
from .prompts import PromptKind
from .result import Segmentation
from .segment import segment
from .settings import NO_MODEL, Settings
from .transforms.maps import Transform

#: Raised whenever the files change, or what a gate was trained on does: the answers of the built-in model, what its
#: training does, or what a setting means.
FORMAT = 4


ATLAS, LABELS, SETTINGS, CONTENT, CORRECTION, CHECKSUMS = (
    "atlas.nii.gz",
    "labels.nii.gz",
    "settings.toml",
    "context.toml",
    "correction.npz",
    "SHA256SUMS",
)


#: A folder with anything else in it is never replaced. All are there, but the correction only where the gate has one.
CONTEXT_NAMES = frozenset({ATLAS, LABELS, SETTINGS, CONTENT, CORRECTION, CHECKSUMS})


#: Settings below ``models`` that change where and how fast a model answers, not what.
_HARMLESS = frozenset(
    {
        "models.nninteractive.server",
        "models.nninteractive.allow_remote",
        "models.nninteractive.timeout_seconds",
        "models.medsam2.feature_cache_mb",
        "models.vesselfm.cache_mib",
    }
)


@dataclass(frozen=True)
class SavedContext:
    """A context folder.

    Parameters
    ----------
    folder : Path
        Where it lies.
    sha256 : str
        Hexadecimal, of its list of checksums: that of everything in it.
    """

    folder: Path
    sha256: str


@dataclass(frozen=True, eq=False)
class Context:
    """An atlas with all that is made of it once.

    Parameters
    ----------
    context : Atlas
        The atlas.
    settings : Settings
        That the gate was trained with; the defaults for queries.
    gate : Gate or None
        None without a model.
    prompt : {"click", "box", "mask", "region"} or None
        What the model was prompted with; None without a model.
    weights_sha256 : str
        Of the model's weights; empty where it has none, or they lie on a server.
    files : mapping of str to str
        Names of the files the atlas was read from, by their role ("atlas", "labels").
    version : str
        Of this package, when the gate was trained.
    saved : SavedContext or None
        Where it was read from; None in memory.
    """

    context: Atlas
    settings: Settings
    gate: Gate | None
    prompt: PromptKind | None
    weights_sha256: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    saved: SavedContext | None = None

    def segment(
        self,
        query: Volume,
        settings: Settings | None = None,
        *,
        device: str = "auto",
        on_stage: Callable[[str], None] | None = None,
        model: Segmenter | None = None,
        transform: Transform | None = None,
        further_fits: Sequence[Transform] = (),
    ) -> Segmentation:
        """Segment one scan; no gate is trained.

        Parameters
        ----------
        query : Volume
            The scan: intensities in any array order and any field of view.
        settings : Settings, optional
            Those of the context if left out.
        device, on_stage, model, transform, further_fits
            As of :func:`~atlassegfm.segment.segment`.

        Raises
        ------
        InputError
            If a setting would make the gate another one, and as :func:`~atlassegfm.segment.segment`.
        RegistrationError, ModelError
            As :func:`~atlassegfm.segment.segment`.
        """
        settings = settings or self.settings
        self.check_settings(settings)
        device = resolve_device(device)
        if model is None:
            model = load_chosen(settings, device)
        self.check_model(model)
        return segment(
            self.context,
            query,
            settings,
            device=device,
            on_stage=on_stage,
            model=model,
            transform=transform,
            further_fits=further_fits,
            gate=self.gate,
        )

    def check_settings(self, settings: Settings) -> None:
        """Refuse settings that the gate was not trained with. Without a model, none is used, and all will do.

        Raises
        ------
        InputError
            If there are any; the message names the first.
        """
        if settings.model == NO_MODEL:
            return
        name, remedy = self._name, "leave it as it is, or make a context with it by atlassegfm customize"
        if settings.model != self.settings.model:
            raise InputError(
                f"{name}: made with the model {self.settings.model!r}, but {settings.model!r} was asked for; {remedy}"
            )
        asked = prompt_kind(settings)
        if asked != self.prompt:
            raise InputError(f"{name}: made with the prompt {self.prompt!r}, but {asked!r} was asked for; {remedy}")
        kept = dict(_gate_settings(self.settings))
        for key, value in _gate_settings(settings):
            if value != kept[key]:
                raise InputError(f"{name}: made with {key} = {kept[key]}, but {value} was asked for; {remedy}")

    def check_model(self, model: Segmenter | None) -> None:
        """Refuse a model with other weights than the gate was trained with, where both are known.

        Raises
        ------
        ModelError
            If they are others.
        """
        found = _weights_sha256(model)
        if found and self.weights_sha256 and found != self.weights_sha256:
            raise ModelError(
                f"{self._name}: made with other weights of the model {self.settings.model!r} (SHA-256 "
                f"{self.weights_sha256[:12]}..., found {found[:12]}...); name those with --model-path, or make "
                "a context with these by atlassegfm customize"
            )

    def save(self, folder: Path) -> SavedContext:
        """Write the context folder, whole or not at all; an earlier one is replaced.

        Parameters
        ----------
        folder : Path
            Its parent exists.

        Raises
        ------
        InputError
            If it cannot be written, or holds anything but a context.
        """
        atlas, labels = self.context.image, self.context.labels
        with replaced_folder(folder, CONTEXT_NAMES) as new:
            # Without their sources: headers of the original files may say more than they should.
            save_volume(Volume(atlas.data, atlas.grid), new / ATLAS)
            save_volume(Volume(labels.data, labels.grid), new / LABELS, structures=self.context.structures)
            # The place of the weights is this machine's.
            _write(new / SETTINGS, to_toml(replace(self.settings, model_path="")))
            _write(new / CONTENT, self._content())
            correction = None if self.gate is None else self.gate.correction
            if correction is not None:
                # Arrays alone, uncompressed: read back without pickles, and the same bytes from the same arrays.
                np.savez(new / CORRECTION, allow_pickle=False, **correction.arrays())
            names = sorted(name for name in CONTEXT_NAMES if (new / name).exists())
            _write(new / CHECKSUMS, "".join(f"{_sha256(new / name)}  {name}\n" for name in names))
            sha256 = _sha256(new / CHECKSUMS)
        return SavedContext(folder, sha256)

    @classmethod
    def load(cls, folder: Path) -> Context:
        """Read a context folder.

        Parameters
        ----------
        folder : Path
            That :meth:`save` or ``atlassegfm customize`` wrote.

        Raises
        ------
        InputError
            If it is none, is incomplete or damaged, or was written in another format.
        """
        if not folder.exists():
            raise InputError(f"{folder}: no such folder; expected a context, as atlassegfm customize writes one")
        if not folder.is_dir():
            raise InputError(f"{folder}: is a file; expected a context folder, as atlassegfm customize writes one")
        if not any((folder / name).exists() for name in (CONTENT, CHECKSUMS)):
            raise InputError(
                f"{folder}: is no context, as it has no {CONTENT}; expected a folder that atlassegfm customize wrote"
            )
        _check_format(folder)
        sha256 = _check_files(folder)
        content = load_toml(folder / CONTENT, "a context")
        version = str(content.get("atlassegfm", "unknown"))
        try:
            settings = with_file(Settings(), folder / SETTINGS)
        except InputError as error:
            raise InputError(f"{error} ({folder} was made by version {version}: {_AGAIN})") from None
        try:
            gate, model = content.get("gate"), content["model"]
            return cls(
                _context_in(folder, content),
                settings,
                None if gate is None else _gate_of(gate, folder / CORRECTION),
                model.get("prompt"),
                model["weights_sha256"],
                dict(content["files"]),
                version,
                SavedContext(folder, sha256),
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{folder / CONTENT}: not as it was written, checksums and all; {_AGAIN}") from None

    def summary(self) -> dict[str, Any] | None:
        """For ``run.json``: name and checksum of the folder, and the files it was made from; None in memory."""
        if self.saved is None:
            return None
        return {
            "folder": self.saved.folder.resolve().name,
            "sha256": self.saved.sha256,
            "atlassegfm": self.version,
            "files": dict(self.files),
        }

    @property
    def _name(self) -> str:
        return "the context" if self.saved is None else str(self.saved.folder)

    def _content(self) -> str:
        """The text of ``context.toml``."""
        import tomli_w

        grid = self.context.image.grid
        content: dict[str, Any] = {
            "format": FORMAT,
            "atlassegfm": self.version,
            "files": dict(self.files),
            "model": {
                "name": self.settings.model,
                **({} if self.prompt is None else {"prompt": self.prompt}),
                "weights_sha256": self.weights_sha256,
            },
            # Headers of NIfTI files have 32 bits; results must be those of the atlas that was read.
            "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        }
        if self.gate is not None:
            plain = asdict(replace(self.gate, correction=None))
            del plain["correction"]
            content["gate"] = {
                name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()
            }
        content["structures"] = [
            {"value": one.value, "name": one.name, "color": list(one.color)} for one in self.context.structures
        ]
        return tomli_w.dumps(content)


def customize(
    context: Atlas,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    on_stage: Callable[[str], None] | None = None,
    model: Segmenter | None = None,
) -> Context:
    """Make once what all queries of an atlas share: the gate, trained on simulated errors of registration.

    Parameters
    ----------
    context : Atlas
        The atlas.
    settings : Settings, optional
        Defaults if left out.
    device : {"auto", "cpu", "cuda"}
        Where to compute.
    on_stage : callable, optional
        Told the name of the stage, and each structure.
    model : Segmenter, optional
        The model that ``settings.model`` names, where it is loaded already.

    Raises
    ------
    InputError
        If a setting cannot be used.
    ModelError
        If the model or the device cannot do what was asked.
    """
    settings = settings or Settings()
    kind = prompt_kind(settings)
    device = resolve_device(device)
    if kind is not None and model is None:
        model = load_chosen(settings, device)
    gate = learn_gate(context, settings, device=device, on_stage=on_stage, model=model)
    sources = {"atlas": context.image.source, "labels": context.labels.source}
    files = {role: source.path.name for role, source in sources.items() if source is not None}
    return Context(context, settings, gate, kind, "" if kind is None else _weights_sha256(model), files)


_AGAIN = "make it anew with atlassegfm customize"


def _gate_settings(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Keys and values that decide the gate besides model and prompt; those of other models left out."""
    used: dict[str, Any] = {"fusion": to_dict(settings.fusion)}
    models = to_dict(settings.models)
    if settings.model in models:
        used["models"] = {settings.model: models[settings.model]}
    yield from ((key, value) for key, value in _flat(used, "") if key not in _HARMLESS)


def _flat(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            yield from _flat(value, key)
        else:
            yield key, value


def _weights_sha256(model: Segmenter | None) -> str:
    """Checksum of the weights, where the model tells it."""
    weights = {} if model is None else model.provenance.get("weights")
    return str(weights.get("sha256") or "") if isinstance(weights, Mapping) else ""


def _check_format(folder: Path) -> None:
    """Refuse another format; what is not even TOML is left to the checksums."""
    path = folder / CONTENT
    try:
        content = load_toml(path, "a context")
    except InputError:
        if not path.exists() or (folder / CHECKSUMS).exists():
            return
        raise
    found = content.get("format")
    if found != FORMAT:
        made_by = f" of version {content['atlassegfm']}" if "atlassegfm" in content else ""
        raise InputError(
            f"{folder}: a context in the format {found}{made_by}, but this version ({__version__}) reads the format "
            f"{FORMAT}; {_AGAIN}, or use that version"
        )


def _check_files(folder: Path) -> str:
    """Compare all files with their checksums; gives the checksum of the list."""
    path = folder / CHECKSUMS
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in path.read_text(encoding="ascii").splitlines())
    except FileNotFoundError:
        raise InputError(f"{path}: missing from the context; copy the whole folder again, or {_AGAIN}") from None
    except (ValueError, OSError):
        listed = {}
    if listed.keys() | {CORRECTION} != CONTEXT_NAMES - {CHECKSUMS}:
        raise InputError(f"{path}: damaged; copy the whole folder again, or {_AGAIN}")
    for name, expected in sorted(listed.items()):
        try:
            found = _sha256(folder / name)
        except FileNotFoundError:
            raise InputError(
                f"{folder / name}: missing from the context; copy the whole folder again, or {_AGAIN}"
            ) from None
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror}); check the permissions") from None
        if found != expected:
            raise InputError(
                f"{folder / name}: damaged or changed, its SHA-256 is {found[:12]}..., expected {expected[:12]}...; "
                f"copy the whole folder again, or {_AGAIN}"
            )
    return _sha256(path)


def _context_in(folder: Path, content: Mapping[str, Any]) -> Atlas:
    """The atlas of a folder whose checksums are right."""
    atlas, labels = load_volume(folder / ATLAS), load_volume(folder / LABELS)
    i, j, k = content["grid"]["shape"]
    grid = Grid((i, j, k), np.array(content["grid"]["affine"]))
    kind = smallest_label_type(int(labels.data.max()))
    structures = []
    for one in content["structures"]:
        red, green, blue = one["color"]
        structures.append(Structure(one["value"], one["name"], (red, green, blue)))
    return Atlas(
        Volume(np.ascontiguousarray(atlas.data, dtype=np.float32), grid),
        Volume(np.ascontiguousarray(labels.data, dtype=kind), grid),
        tuple(structures),
    )


def _gate_of(content: Mapping[str, Any], correction: Path) -> Gate:
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in content.items()}
    if not correction.exists():
        return Gate(**values)
    with np.load(correction, allow_pickle=False) as arrays:
        return Gate(**values, correction=Correction.of_arrays(arrays))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    # Bytes, so that line ends are the same on every system.
    path.write_bytes(text.encode())
