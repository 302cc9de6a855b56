"""``atlassegfm suggest``."""

import functools
from pathlib import Path

import typer

from ..core.text import counted, duration
from .fields import argument, option, options
from .options import DeviceOptions, ScreenOptions, SettingsOptions, split_list
from .report import require_pictures
from .session import print_json, print_table


@options
class SuggestOptions(ScreenOptions, DeviceOptions, SettingsOptions):
    """Options of ``suggest``."""

    folder: Path = argument("FOLDER", "Scans of one kind, without labels.")
    out: Path | None = option("--out -o OUT", "Folder that gets suggest.png (why) and suggest.json.")
    contoured: str | None = option("--contoured A,B,...", "Scans that are atlases already: which one next.")
    landmarks: int = option("--landmarks N", "Of more than 12 scans, compare each with N others.", 8, min=3)
    finalists: int = option("--finalists N", "Of more than 12 scans, then compare the best N with all.", 3, min=1)
    picture: bool = option("--picture/--no-picture", "Draw OUT/suggest.png (extra 'report').", True)


def suggest(options: SuggestOptions) -> None:
    """Say which scan to contour: the one that would reach all others best as the atlas, or as a further one.

    Scans are registered coarsely to each other, and compared. No labels are needed.
    """
    with options.session() as session:
        out = options.out
        picture = options.picture and out is not None
        if picture:
            require_pictures()
        from ..check.suggest import scans_in
        from ..check.suggest import suggest as rank
        from ..check.suggest_figure import draw_suggestion
        from ..core.device import resolve_device
        from ..core.files import output_folder, write_json

        settings = options.settings()
        files, device = scans_in(options.folder), resolve_device(options.device)

        begin = functools.partial(session.begin_pair, name="pair", stage="registration")
        found = rank(
            files,
            settings.registration,
            contoured=split_list(options.contoured, "--contoured"),
            landmarks=options.landmarks,
            finalists=options.finalists,
            seed=settings.seed,
            device=device,
            on_pair=begin,
        )
        for _, reason in found.failures:
            session.error(reason)
        if out is not None:
            with output_folder(out):
                write_json(out / "suggest.json", found.summary())
                if picture:
                    draw_suggestion(found, out / "suggest.png")
    if options.as_json:
        print_json(found.summary())
        return
    work = f"{counted(found.pairs, 'pair')} in {duration(found.seconds)}"
    when = "next" if found.contoured else "first"
    typer.echo(f"contour {found.candidates[0].name} {when}  ({work})")
    if not found.differs:
        typer.echo("the scans differ little: others would do as well")
    rows = [
        (str(number), one.name, f"{one.score:.3f}", f"{one.lowest:.3f}", one.furthest, str(one.compared))
        for number, one in enumerate(found.candidates, start=1)
    ]
    print_table(("rank", "scan", "score", "lowest", "to", "compared with"), rows)
    if out is not None:
        typer.echo(f"\nwhy       {out / ('suggest.png' if picture else 'suggest.json')}")
