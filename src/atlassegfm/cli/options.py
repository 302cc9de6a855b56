"""Groups of options that several commands have."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..core.text import did_you_mean
from .fields import flag, names_option, option, options
from .session import Session, accept_licences, open_session

if TYPE_CHECKING:
    from ..atlas import Atlas
    from ..dicom import Selection
    from ..settings import Settings


@options
class ScreenOptions:
    """What is shown."""

    as_json: bool = flag("--json", "Print the result as JSON.")
    quiet: bool = flag("--quiet -q", "Show no progress; warnings and errors stay.")
    log: Path | None = option("--log FILE", "Add progress, warnings and errors to this file, with their time.")

    def session(self, *, warnings: bool = True) -> AbstractContextManager[Session]:
        """Open the session of a command."""
        return open_session(self.quiet, warnings=warnings, log=self.log)


@options
class SettingsOptions:
    """Settings of a job."""

    config: Path | None = option("--config FILE", "Settings in TOML, as `atlassegfm settings` prints them.")
    overrides: list[str] | None = option(
        "--set KEY=VALUE", "Change a setting; may be repeated. `atlassegfm settings` lists them."
    )
    seed: int | None = option("--seed N", "Seed of the random numbers [default: 0].")

    def settings(self, base: Settings | None = None) -> Settings:
        """Build the settings: defaults (or ``base``), then the file, then ``--set``, then options of their own."""
        from ..core.config import with_file, with_overrides, with_table
        from ..settings import Settings

        chosen = base or Settings()
        if self.config is not None:
            chosen = with_file(chosen, self.config)
        chosen = with_overrides(chosen, self.overrides or ())
        for key in ("model", "model_path", "prompt", "seed"):
            if (value := getattr(self, key, None)) is not None:
                text = str(value) if isinstance(value, Path) else value
                chosen = with_table(chosen, {key: text}, origin=f"--{key.replace('_', '-')}")
        return chosen


@options
class DeviceOptions:
    """Compute device."""

    device: str = option("--device auto|cpu|cuda", "Where to compute.", "auto")


@options
class ModelOptions(SettingsOptions):
    """The segmentation model."""

    model: str | None = option("--model NAME[,NAME]", "Segmentation model, several, or none [default: builtin].")
    model_path: str | None = option(
        "--model-path PATH",
        "File or folder of the model's weights, of several as NAME=PATH,NAME=PATH [default: where `atlassegfm models "
        "show NAME` says].",
    )
    accept_licence: bool = flag(
        "--accept-licence", "Accept the licence of the model's weights, where it asks for that; recorded once."
    )
    prompt: str | None = option("--prompt auto|click|box|mask", "Prompt of the model [default: auto].")

    @property
    def weights_given(self) -> list[Path]:
        """Paths of weights on the command line."""
        return [Path(part.rpartition("=")[2]) for part in (self.model_path or "").split(",") if part]

    def accept(self, settings: Settings, session: Session) -> None:
        """Record that the user accepts the licences of the models' weights, and name them; refuse a prompt of none."""
        if self.prompt is not None and not settings.model_names:
            raise InputError(f"--prompt {self.prompt}: there is no model to prompt; leave it out, or choose a --model")
        if self.accept_licence:
            accept_licences(settings.model_names, session)


@options
class StructureOptions:
    """Structures to take from labels."""

    structures: str | None = option(
        "--structures A,B,...", "Structures to take, by name, pattern or number [default: all]."
    )
    synonyms: Path | None = option(
        "--synonyms FILE", 'TOML of names and what files call them: Brainstem = ["brain stem", "BS*"].'
    )
    overlap: str = option(
        "--overlap refuse|first|last",
        "Which structure of an RTSTRUCT or DICOM-SEG gets voxels that several have.",
        "refuse",
    )
    interpolate_slices: bool = flag(
        "--interpolate-slices",
        "Fill single slices without contours between two with contours, as planning systems do (RTSTRUCT).",
    )

    def selection(self) -> Selection:
        """Build the selection of structures; raise InputError if an option cannot be used."""
        from ..dicom import OVERLAPS, Selection, read_synonyms

        wanted = split_list(self.structures, "--structures")
        rule = next((one for one in OVERLAPS if one == self.overlap), None)
        if rule is None:
            meant = did_you_mean(self.overlap, OVERLAPS)
            raise InputError(f"--overlap {self.overlap}: expected one of {', '.join(OVERLAPS)}{meant}")
        synonyms = {} if self.synonyms is None else read_synonyms(self.synonyms)
        return Selection(wanted, synonyms, rule, self.interpolate_slices)


@options
class AtlasOptions(StructureOptions):
    """The annotated scan, from files or from a context folder."""

    atlas: Path | None = option("--atlas IMG", "The annotated scan.")
    labels: Path | None = option("--labels LAB", "Labels of the atlas: label map, RTSTRUCT or DICOM-SEG.")
    names: Path | None = names_option()
    context: Path | None = option(
        "--context CTX", "A folder that `atlassegfm customize` wrote, instead of atlas and labels."
    )
    atlas_series: str | None = option("--atlas-series S", "Which series of the atlas's DICOM folder.")

    def check_atlas(self) -> None:
        """Check that either an atlas with its labels or a context is given; raise InputError if not."""
        if self.context is None:
            if self.atlas is None or self.labels is None:
                missing = "--atlas" if self.atlas is None else "--labels"
                raise InputError(f"Missing option '{missing}'; give --atlas and --labels, or --context")
            return
        names = ("atlas", "labels", "names", "structures", "synonyms", "atlas_series", "overlap", "interpolate_slices")
        for name in names:
            if getattr(self, name) != getattr(AtlasOptions, name):  # the default
                given = f"--{name.replace('_', '-')} and --context"
                raise InputError(f"{given} do not go together: the context has its own atlas and structures")

    @property
    def gives_atlas(self) -> bool:
        """Whether any of the options that say which atlas is there, for commands that can do without."""
        return any(one is not None for one in (self.context, self.atlas, self.labels, self.names))

    def load_atlases(self) -> tuple[Atlas, ...]:
        """Read the annotated scan, of a context all of them, the first one first."""
        self.check_atlas()
        from ..atlas import Atlas
        from ..context import Context

        if self.context is not None:
            return Context.load(self.context).atlases
        assert self.atlas is not None
        assert self.labels is not None
        series, selection = self.atlas_series, self.selection()
        return (Atlas.from_files(self.atlas, self.labels, self.names, series=series, selection=selection),)


def split_list(text: str | None, option: str) -> tuple[str, ...]:
    """Split a list at its commas; empty if it is not given; raise InputError if a part is empty."""
    if text is None:
        return ()
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise InputError(f"{option} {text}: expected names with commas between")
    return parts
