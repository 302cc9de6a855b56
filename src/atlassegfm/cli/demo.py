"""``atlassegfm demo``."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer

from .fields import option, options
from .options import DeviceOptions, ScreenOptions, SettingsOptions
from .report import require_pictures
from .session import print_json, print_table, score_text


@options
class DemoOptions(ScreenOptions, DeviceOptions, SettingsOptions):
    """Options of ``demo``."""

    out: Path = option("--out -o OUT", "Folder for the scans and the result.", Path("atlassegfm-demo"))
    picture: bool = option("--picture/--no-picture", "Draw OUT/demo.png (extra 'report').", True)


def demo(options: DemoOptions) -> None:
    """Do the whole job on an embedded pair of scans; nothing to download."""
    with options.session() as session:
        if options.picture:
            require_pictures()
        from ..core.device import resolve_device
        from ..core.progress import Steps, query_steps
        from ..demo import ATLAS, LABELS, QUERY
        from ..demo.run import run_demo
        from ..models.table import prompt_kind
        from ..settings import NO_MODEL

        settings = options.settings()
        prompt_kind(settings)
        device, out = resolve_device(options.device), options.out
        steps = query_steps(model=settings.model != NO_MODEL, gate=True)
        session.steps = Steps({**steps, **({"drawing the picture": 2.0} if options.picture else {})})
        outcome = run_demo(out, settings, device=device, picture=options.picture, on_stage=session.progress)
    means = outcome.means()
    scores = [(structure.name, dice) for structure, dice in outcome.scores.items()]
    if options.as_json:
        structures = [{"name": name, **_by_method(dice)} for name, dice in scores]
        dice = {"structures": structures, "mean": _by_method(means)}
        print_json({"dice": dice, "run": outcome.run.model_dump(mode="json")})
        return
    typer.echo("Dice against the true labels")
    rows = [(name, *map(score_text, dice)) for name, dice in (*scores, ("mean", means))]
    print_table(("structure", "atlas only", "model", "fused"), rows, numbers_from=1)
    data = out / "data"
    command = ["atlassegfm", "segment", "--atlas", str(data / ATLAS), "--labels", str(data / LABELS)]
    command += [str(data / QUERY), "-o", str(out / "result")]
    command += [word for assignment in options.overrides or () for word in ("--set", assignment)]
    command += [] if options.seed is None else ["--seed", str(options.seed)]
    typer.echo(f"\nresult    {out / 'result'}")
    if options.picture:
        typer.echo(f"picture   {out / 'demo.png'}")
    typer.echo(f"repeat    {shlex.join(command)}")


def _by_method(dice: Sequence[float | None]) -> dict[str, float | None]:
    rounded = [None if one is None or one != one else round(one, 4) for one in dice]
    return dict(zip(("atlas", "model", "fused"), rounded, strict=True))
