"""Options of the commands: one frozen dataclass a command, of shared groups."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..core.errors import InputError
from ..core.text import did_you_mean
from .help import Command

if TYPE_CHECKING:
    from ..atlas import Atlas
    from ..dicom import Selection
    from ..settings import Settings
    from .session import Session

O = TypeVar("O")  # noqa: E741

options = dataclass(frozen=True, kw_only=True)


def command(
    app: typer.Typer, options_class: type[O], name: str
) -> Callable[[Callable[[O], None]], Callable[[O], None]]:
    """Register a function of one options object as a command.

    Parameters
    ----------
    app : typer.Typer
    options_class : type
        Dataclass whose fields are annotated as typer takes parameters.
    name : str
        Of the command. Its help is the function's docstring.
    """

    def register(function: Callable[[O], None]) -> Callable[[O], None]:
        def call(**values: Any) -> None:
            function(options_class(**values))

        hints = typing.get_type_hints(options_class, include_extras=True)
        parameters = []
        for field in sorted(fields(options_class), key=_position):  # type: ignore[arg-type]
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {field.name: field.annotation for field in parameters}
        call.__doc__ = function.__doc__
        app.command(name, cls=Command)(call)
        return function

    return register


def _position(field: Any) -> bool:
    """Fields without a default first: they are what a command is about."""
    return field.default is not MISSING


SeriesOption = Annotated[
    str | None,
    typer.Option(
        "--series",
        metavar="S",
        help="Which series of a DICOM folder: its number, UID or part of its description; '#2' behind it: the second "
        "volume of a 4-D series.",
    ),
]


@options
class ScreenOptions:
    """What is shown."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; warnings and errors stay.")] = False
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Add progress, warnings and errors to this file, with their time."),
    ] = None


@options
class SettingsOptions:
    """Settings of a job."""

    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Settings in TOML, as `atlassegfm settings` prints them."),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting; may be repeated. `atlassegfm settings` lists them."
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of the random numbers [default: 0].")
    ] = None

    def settings(self, base: Settings | None = None) -> Settings:
        """Build the settings: defaults (or ``base``), then the file, then ``--set``, then options of their own."""
        from ..core.config import with_file, with_overrides, with_table
        from ..settings import Settings

        chosen = base or Settings()
        if self.config is not None:
            chosen = with_file(chosen, self.config)
        chosen = with_overrides(chosen, self.overrides or ())
        for key in ("model", "model_path", "prompt", "seed"):
            value = getattr(self, key, None)
            if value is not None:
                text = str(value) if isinstance(value, Path) else value
                chosen = with_table(chosen, {key: text}, origin=f"--{key.replace('_', '-')}")
        return chosen


@options
class DeviceOptions:
    """Compute device."""

    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")] = "auto"


@options
class ModelOptions(SettingsOptions):
    """The segmentation model."""

    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Segmentation model, or none [default: builtin].")
    ] = None
    model_path: Annotated[
        Path | None,
        typer.Option(
            "--model-path",
            metavar="PATH",
            help="File or folder of the model's weights [default: where `atlassegfm models show NAME` says].",
        ),
    ] = None
    accept_licence: Annotated[
        bool,
        typer.Option(
            "--accept-licence",
            help="Accept the licence of the model's weights, where it asks for that; recorded once.",
        ),
    ] = False
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="auto|click|box|mask", help="Prompt of the model [default: auto]."),
    ] = None

    def accept(self, model: str, session: Session) -> None:
        """Record that the user accepts the licence of a model's weights, and name it; refuse a prompt of no model."""
        from ..settings import NO_MODEL
        from .session import accept_licences

        if self.prompt is not None and model == NO_MODEL:
            raise InputError(f"--prompt {self.prompt}: there is no model to prompt; leave it out, or choose a --model")
        if self.accept_licence:
            accept_licences([model], session)


@options
class StructureOptions:
    """Structures to take from labels."""

    structures: Annotated[
        str | None,
        typer.Option(
            "--structures",
            metavar="A,B,...",
            help="Structures to take, by name, pattern or number [default: all].",
        ),
    ] = None
    synonyms: Annotated[
        Path | None,
        typer.Option(
            "--synonyms",
            metavar="FILE",
            help='TOML of names and what files call them: Brainstem = ["brain stem", "BS*"].',
        ),
    ] = None
    overlap: Annotated[
        str,
        typer.Option(
            "--overlap",
            metavar="refuse|first|last",
            help="Which structure of an RTSTRUCT or DICOM-SEG gets voxels that several have.",
        ),
    ] = "refuse"
    interpolate_slices: Annotated[
        bool,
        typer.Option(
            "--interpolate-slices",
            help="Fill single slices without contours between two with contours, as planning systems do (RTSTRUCT).",
        ),
    ] = False

    def selection(self) -> Selection:
        """Build the selection of structures.

        Raises
        ------
        InputError
            If an option cannot be used.
        """
        from ..dicom import OVERLAPS, Selection, read_synonyms

        wanted = split_list(self.structures, "--structures")
        rule = next((one for one in OVERLAPS if one == self.overlap), None)
        if rule is None:
            raise InputError(
                f"--overlap {self.overlap}: expected one of {', '.join(OVERLAPS)}{did_you_mean(self.overlap, OVERLAPS)}"
            )
        synonyms = {} if self.synonyms is None else read_synonyms(self.synonyms)
        return Selection(wanted, synonyms, rule, self.interpolate_slices)


@options
class AtlasOptions(StructureOptions):
    """The annotated scan, from files or from a context folder."""

    atlas: Annotated[Path | None, typer.Option("--atlas", metavar="IMG", help="The annotated scan.")] = None
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="LAB", help="Labels of the atlas: label map, RTSTRUCT or DICOM-SEG."),
    ] = None
    names: Annotated[
        Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
    ] = None
    context: Annotated[
        Path | None,
        typer.Option(
            "--context", metavar="CTX", help="A folder that `atlassegfm customize` wrote, instead of atlas and labels."
        ),
    ] = None
    series: SeriesOption = None
    atlas_series: Annotated[
        str | None,
        typer.Option("--atlas-series", metavar="S", help="Which series of the atlas's DICOM folder, as for --series."),
    ] = None

    def check_atlas(self) -> None:
        """Check that either an atlas with its labels or a context is given.

        Raises
        ------
        InputError
            If not.
        """
        given: dict[str, object] = {"--atlas": self.atlas, "--labels": self.labels, "--names": self.names}
        if self.context is not None:
            given |= {"--structures": self.structures, "--synonyms": self.synonyms, "--atlas-series": self.atlas_series}
            given["--overlap"] = None if self.overlap == "refuse" else self.overlap
            given["--interpolate-slices"] = self.interpolate_slices or None
            for option, value in given.items():
                if value is not None:
                    raise InputError(
                        f"{option} and --context do not go together: the context has its own atlas and structures"
                    )
            return
        for option in ("--atlas", "--labels"):
            if given[option] is None:
                raise InputError(f"Missing option '{option}'; give --atlas and --labels, or --context")

    def load_atlas(self) -> Atlas:
        """Read the annotated scan."""
        if self.context is not None:
            from ..context import Context

            return Context.load(self.context).atlas
        from ..atlas import Atlas

        if self.atlas is None or self.labels is None:
            raise InputError("Missing option '--atlas'; give --atlas and --labels, or --context")
        return Atlas.from_files(
            self.atlas, self.labels, self.names, series=self.atlas_series, selection=self.selection()
        )


def split_list(text: str | None, option: str) -> tuple[str, ...]:
    """Split a list at its commas; empty if it is not given.

    Raises
    ------
    InputError
        If a part is empty.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text}: expected names with commas between")
    return tuple(parts)
