"""``atlassegfm models``: list the models, show what each needs, fetch its weights, try them."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import InputError
from ..core.extras import is_installed
from ..core.text import counted
from .fields import argument, command, flag, option, options
from .help import HELP_OPTIONS, Group
from .options import DeviceOptions, ModelOptions, ScreenOptions
from .session import EXIT_FAILURES, accept_licences, open_session, print_json, print_table, score_text

if TYPE_CHECKING:
    from ..models import ModelDescription
    from ..models.base import PublishedWeights
    from ..models.weights import StoredFile

#: Whether an extra is installed: on the page of a model, and in the list.
_STATES = {True: ("installed", "installed"), False: ("not installed", "missing"), None: ("not known", "?")}


class _DefaultGroup(Group):
    """Subcommands, and ``models`` alone for the list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name in front where options stand alone."""
        if not args or (args[0].startswith("-") and args[0] not in HELP_OPTIONS):
            args = ["list", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_DefaultGroup,
    help="The segmentation models: `models` lists them, `models show NAME` describes one, `models fetch NAME` "
    "downloads its weights, `models verify NAME` tries them.",
)


@options
class ListOptions:
    """Options of ``models list``."""

    as_json: bool = flag("--json", "Print the result as JSON.")


name_option = functools.partial(argument, "NAME", "Name of the model, as `atlassegfm models` lists it.")


@options
class ShowOptions(ScreenOptions):
    """Options of ``models show``."""

    name: str = name_option()
    folder: Path | None = option("--folder FOLDER", "Look only here, as after `models fetch --folder`.")


@options
class FetchOptions:
    """Options of ``models fetch``."""

    name: str = name_option()
    folder: Path | None = option(
        "--folder FOLDER", "Folder for the files; name it with --model-path later [default: where they are looked for]."
    )
    accept_licence: bool = flag("--accept-licence", "Accept the licence of the weights, where needed; recorded once.")
    quiet: bool = flag("--quiet -q", "Show no progress; warnings and errors stay.")


@options
class VerifyOptions(ScreenOptions, ModelOptions, DeviceOptions):
    """Options of ``models verify``."""

    name: str = name_option()


@command(app, "list")
def list_models(options: ListOptions) -> None:
    """List the segmentation models, and whether what they need is there."""
    with open_session(quiet=True):
        from ..models import BASELINES, MODELS, ModelDescription
        from ..models.weights import folder_with_weights, folders_of
        from ..settings import NO_MODEL

        rows = []
        for row in (
            *MODELS.values(),
            *BASELINES.values(),
            ModelDescription(NO_MODEL, "the result is the warped atlas", (), ""),
        ):
            found = row.weights and folder_with_weights(row.weights, folders_of(row.name, row.weights))
            weights = {"needs_weights": row.weights is not None, "weights": found and str(found)}
            licence = "" if row.name == NO_MODEL else row.weights_licence
            rows.append(_described(row) | weights | {"weights_licence": licence})
    if options.as_json:
        print_json(rows)
        return
    table = []
    for content in rows:
        extra = _STATES[content["extra_installed"]][1] if content["extra"] else "-"
        place, licence = "-", "-"
        if content["needs_weights"]:
            place, licence = "found" if content["weights"] else "missing", content["weights_licence"]
        table.append((content["name"], ", ".join(content["prompts"]) or "-", extra, place, licence))
    print_table(("model", "prompts", "extra", "weights", "licence of the weights"), table)
    typer.echo()
    print_table(("model", "what it is"), [(content["name"], content["summary"]) for content in rows])
    typer.echo("\natlassegfm models show NAME    licences, files and figures of one")
    typer.echo("atlassegfm models fetch NAME   download its weights")
    typer.echo("atlassegfm models verify NAME  try them on the embedded scans")


@command(app, "show")
def show(options: ShowOptions) -> None:
    """Show one model: licences, the paper's figures, its files, and which of them were found.

    The exit code is 0 whether its weights are there or not.
    """
    with open_session(quiet=options.quiet or options.as_json, log=options.log) as session:
        row = _describe(options.name)
        if row.weights is not None:
            session.progress("reading the weights")
        weights = None if row.weights is None else _weights(row.name, row.weights, options.folder)
        content = _described(row) | {"paper_dice": dict(row.paper_dice), "weights": weights}
    if options.as_json:
        print_json(content)
        return
    lines = [
        ("model", row.name),
        ("what it is", row.summary),
        ("prompts, best first", ", ".join(row.prompts) or "none"),
        ("Dice in the paper", ", ".join(f"{kind} {dice:g} %" for kind, dice in row.paper_dice.items()) or "none"),
        ("extra", f"{row.extra} ({_STATES[content['extra_installed']][0]})" if row.extra else "none needed"),
        ("licence of the code", row.code_licence),
    ]
    if weights is None:
        lines.append(("weights", "none needed"))
    else:
        accepted = weights["licence_accepted"]
        state = f"accepted on {accepted}" if accepted else "not accepted yet"
        lines += [
            ("licence of the weights", f"{weights['licence']}, {weights['licence_url']}"),
            ("", f"no commercial use; {state}" if weights["non_commercial"] else "need not be accepted"),
            ("published", weights["page"]),
            ("revision", weights["revision"]),
            *(("looked for in" if n == 0 else "", folder) for n, folder in enumerate(weights["looked_in"])),
            ("found in", weights["found"] or "none of them"),
        ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"  {name:<{width}}  {text}".rstrip())
    for one in weights["files"] if weights else ():
        typer.echo(f"\n  {one['path']}")
        typer.echo(f"    published  {one['size'] or 'not known'} bytes, sha256 {one['sha256'] or 'not known'}")
        typer.echo(f"    found      {_found_text(one)}")


@command(app, "fetch")
def fetch(options: FetchOptions) -> None:
    """Download the weights of a model; the only command that downloads anything.

    The environment variable HF_ENDPOINT names a mirror of Hugging Face, HTTPS_PROXY a proxy.
    """
    name = options.name
    with open_session(quiet=True) as session:  # a progress bar would write over the question
        published = _describe(name).weights
        if published is not None and (options.accept_licence or _agrees(name, published)):
            accept_licences([name], session)
    with open_session(options.quiet) as session:
        from ..models import fetch_weights

        fetched = fetch_weights(name, options.folder, session.progress)
    if fetched is None:
        typer.echo(f"{name} needs no weights: nothing to fetch")
        return
    count = len(fetched.downloaded)
    done = f"{counted(count, 'file')} downloaded" if count else "complete already, none downloaded"
    typer.echo(f"{name}: {done}; the weights are in {fetched.folder}")
    for one in fetched.files:
        typer.echo(f"  {one.file.path}  {one.size} bytes, {one.verdict}\n    sha256 {one.sha256}")
    if options.folder is not None:
        typer.echo(f"use them with --model-path {fetched.folder}")


@command(app, "verify")
def verify(options: VerifyOptions) -> None:
    """Load a model with its weights, run the embedded pair of scans with it, and compare the Dice with the known one.

    The exit code is 1 if the Dice is not in the band that was recorded with the published weights.
    """
    with options.session() as session, tempfile.TemporaryDirectory() as folder:
        from ..core.config import with_table
        from ..core.device import resolve_device
        from ..core.progress import Steps, query_steps
        from ..demo.run import run_demo

        if options.model not in (None, options.name):
            raise InputError(f"--model {options.model}: the model to verify is named without an option")
        row = _describe(options.name)
        settings = with_table(options.settings(), {"model": row.name}, origin="NAME")
        options.accept(settings, session)
        session.steps = Steps(query_steps(model=True, gate=True))
        begun = time.perf_counter()
        device = resolve_device(options.device)
        outcome = run_demo(Path(folder), settings, device=device, picture=False, on_stage=session.progress)
        seconds = time.perf_counter() - begun
    _, found, fused = outcome.means()
    model = float("nan") if found is None else found
    band, weights = row.demo_dice, outcome.run.model.provenance.get("weights", {})
    is_right = None if band is None else band[0] <= model <= band[1]
    if options.as_json:
        dice = {"model": round(model, 4), "fused": round(fused, 4), "expected": band, "as_expected": is_right}
        print_json(
            {"model": row.name, "device": device, "seconds": round(seconds, 1), "weights": weights, "dice": dice}
        )
    else:
        rows = [(structure.name, *map(score_text, dice)) for structure, dice in outcome.scores.items()]
        rows.append(("mean", *map(score_text, outcome.means())))
        print_table(("structure", "atlas only", "model", "fused"), rows, numbers_from=1)
        typer.echo(f"\nweights   {weights.get('file', 'none')}  sha256 {weights.get('sha256', '-')}")
        typer.echo(f"time      {seconds:.0f} s, the gate's training included, {device}")
        expected = (
            "nobody has recorded one yet; please report yours" if band is None else f"{band[0]:.3f} to {band[1]:.3f}"
        )
        typer.echo(f"expected  mean Dice of the model: {expected}")
        if is_right is not None:
            typer.echo(f"verified  {'yes' if is_right else 'NO: it is outside'}")
    if is_right is False:
        raise typer.Exit(EXIT_FAILURES)


def _describe(name: str) -> ModelDescription:
    from ..models import describe_published
    from ..settings import NO_MODEL

    if name == NO_MODEL:
        raise InputError(f"{NO_MODEL!r} stands for no model, where the result is the warped atlas; name a model")
    return describe_published(name)


def _described(row: ModelDescription) -> dict[str, Any]:
    """What the list and the page of a model both say."""
    return {
        "name": row.name,
        "summary": row.summary,
        "prompts": list(row.prompts),
        "extra": row.extra or None,
        "extra_installed": is_installed(row.extra) if row.extra else True,
        "code_licence": row.code_licence,
    }


def _agrees(name: str, published: PublishedWeights) -> bool:
    """Show the licence and ask, where there is somebody to ask; whoever says no gets nothing."""
    from ..models import licence_accepted

    if not published.non_commercial or licence_accepted(name) is not None or not sys.stdin.isatty():
        return False
    licence = f"{published.licence}, no commercial use\nread it at {published.licence_url}"
    typer.echo(f"licence of the weights of {name}: {licence}\nDo you accept it? [y/N] ", err=True, nl=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(f"the licence of the weights of the model {name!r} was not accepted; nothing was downloaded")
    return True


def _weights(name: str, published: PublishedWeights, folder: Path | None) -> dict[str, Any]:
    """Compare what is published with what was found."""
    from ..models.weights import examine, folder_with_weights, folders_of, licence_accepted

    folders = folders_of(name, published) if folder is None else (folder,)
    found = folder_with_weights(published, folders)
    # Where they are incomplete, what is missing from the folder that fetching would fill.
    stored = examine(published, found or (*folders, Path(published.package))[0])
    return asdict(published) | {
        "page": published.page,
        "licence_accepted": licence_accepted(name, published),
        "looked_in": [str(one) for one in folders],
        "found": None if found is None else str(found),
        "files": [_file(published, one) for one in stored],
    }


def _file(published: PublishedWeights, stored: StoredFile) -> dict[str, Any]:
    found = asdict(stored) | {"path": str(stored.path), "expected": stored.expected or None}
    return {**found.pop("file"), "url": published.url_of(stored.file), "found": found}


def _found_text(file: dict[str, Any]) -> str:
    found = file["found"]
    if found["verdict"] == "missing":
        return f"missing, expected at {found['path']}"
    verdict = "nothing to compare with" if found["verdict"] == "not known" else found["verdict"]
    expected = f", expected {found['expected']}" if found["expected"] else ""
    return f"{found['size']} bytes, sha256 {found['sha256'] or 'not computed'}: {verdict}{expected}"
