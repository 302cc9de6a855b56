"""``atlassegfm demo``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError, MissingExtraError
from .options import DeviceOptions, ScreenOptions, SettingsOptions, options
from .session import open_session, or_none, print_json, print_table, score_text


@options
class DemoOptions(ScreenOptions, DeviceOptions, SettingsOptions):
    """Options of ``demo``."""

    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder for the scans and the result.")] = (
        Path("atlassegfm-demo")
    )
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Draw OUT/demo.png (extra 'report').")] = True


def demo(options: DemoOptions) -> None:
    """Do the whole job on an embedded pair of scans; nothing to download."""
    with open_session(options.quiet, log=options.log) as session:
        if options.picture:
            from ..report import require_report_extra

            try:
                require_report_extra()
            except MissingExtraError as error:
                raise InputError(f"{error}, or use --no-picture") from None
        from ..core.device import resolve_device
        from ..demo import ATLAS, LABELS, QUERY
        from ..demo.run import run_demo
        from ..models.choice import prompt_kind

        settings = options.settings()
        prompt_kind(settings)
        device, out = resolve_device(options.device), options.out
        outcome = run_demo(out, settings, device=device, picture=options.picture, on_stage=session.progress)
    means = outcome.means()
    if options.as_json:
        kinds = ("atlas", "model", "fused")
        scores = [
            {"name": one.structure.name, **{kind: or_none(getattr(one, kind)) for kind in kinds}}
            for one in outcome.scores
        ]
        mean = dict(zip(kinds, map(or_none, means), strict=True))
        print_json({"dice": {"structures": scores, "mean": mean}, "run": outcome.run.model_dump(mode="json")})
        return
    rows: list[tuple[str, ...]] = [
        (one.structure.name, score_text(one.atlas), score_text(one.model), score_text(one.fused))
        for one in outcome.scores
    ]
    rows.append(("mean", *(score_text(mean) for mean in means)))
    typer.echo("Dice against the true labels")
    print_table(("structure", "atlas only", "model", "fused"), rows, numbers_from=1)
    data = out / "data"
    command = ["atlassegfm", "segment", "--atlas", str(data / ATLAS), "--labels", str(data / LABELS)]
    command += [str(data / QUERY), "-o", str(out / "result")]
    for assignment in options.overrides or ():
        command += ["--set", assignment]
    if options.seed is not None:
        command += ["--seed", str(options.seed)]
    typer.echo(f"\nresult    {out / 'result'}")
    if options.picture:
        typer.echo(f"picture   {out / 'demo.png'}")
    typer.echo(f"repeat    {shlex.join(command)}")
