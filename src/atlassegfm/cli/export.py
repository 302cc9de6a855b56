"""``atlassegfm export``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import InputError
from .fields import argument, option, options, required
from .options import AtlasOptions, ScreenOptions
from .session import Session, print_json

if TYPE_CHECKING:
    from ..export import Derivatives, Found, TrainingSet


@options
class ExportOptions(ScreenOptions, AtlasOptions):
    """Options of ``export``."""

    folder: Path = argument("OUT", "Folder of results, as `segment -o` and `serve -o` write it.")
    images: list[Path] = required(
        "--images PATH",
        "The scans: files, DICOM series folders, or folders with them anywhere below; may be repeated. They are found "
        "by their content, as results do not say where scans lie.",
    )
    nnunet: Path | None = option(
        "--nnunet DATASET", "Training set to make, in nnU-Net's raw layout: a new folder DatasetNNN_NAME."
    )
    bids: Path | None = option(
        "--bids FOLDER", "BIDS derivatives to make: a new folder, such as derivatives/atlassegfm in the dataset."
    )
    channel: str | None = option(
        "--channel NAME",
        "With --nnunet: what the scans are, such as CT, MR or T2; nnU-Net normalises CT in its own way.",
    )

    def check(self) -> None:
        """Refuse options that do not go together, before anything is read."""
        if (self.nnunet is None) == (self.bids is None):
            raise InputError("expected one of --nnunet DATASET and --bids FOLDER")
        if self.nnunet is not None and not self.channel:
            raise InputError("--channel: is missing; say what the scans are, as nnU-Net normalises CT in its own way")
        if self.gives_atlas:
            self.check_atlas()
        if self.bids is not None and (self.gives_atlas or self.channel is not None):
            raise InputError("--bids: takes results alone; leave out the atlas and --channel, which go with --nnunet")


def export(options: ExportOptions) -> None:
    """Write results as a training set of nnU-Net, or as BIDS derivatives.

    For training, structures that are good or that a person accepted become labels, as corrected. Where the others
    may be, voxels are ignored, not background; a case without any good structure is left out. Give the atlas too: its
    labels are the ones a person drew. DATASET/export.csv says of every structure what was taken, and why. BIDS
    derivatives have all structures, with their verdicts beside them.

    Nothing is overwritten, and the folder is whole or not there.
    """
    with options.session() as session:
        options.check()
        from ..export import find_results, write_bids
        from ..export.nnunet import check_dataset

        if options.nnunet is not None:
            check_dataset(options.nnunet)
        session.progress("finding the scans")
        found = find_results(options.folder, options.images)
        done: TrainingSet | Derivatives
        if options.nnunet is not None:
            done = _training_set(options, found, session)
        elif options.bids is not None:
            done = write_bids(found, options.bids, on_case=_on_case(session))
        for name, reason in sorted(done.left_out.items()):
            session.say(f"left out, {name}: {reason}")
    if options.as_json:
        print_json(done.to_dict())
    else:
        for line in done.lines():
            typer.echo(line)


def _on_case(session: Session) -> Callable[[int, int, str], None]:
    return functools.partial(session.begin, stage="export")


def _training_set(options: ExportOptions, found: Found, session: Session) -> TrainingSet:
    from ..export import write_nnunet

    atlases = options.load_atlases() if options.gives_atlas else ()
    if not atlases:
        session.say("without the atlas, whose labels a person drew; give --context, or --atlas and --labels")
    assert options.nnunet is not None
    assert options.channel is not None
    return write_nnunet(found, options.nnunet, atlases, channel=options.channel, on_case=_on_case(session))
