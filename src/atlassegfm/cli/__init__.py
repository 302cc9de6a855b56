"""The command line: arguments to volumes and settings, results to tables and exit codes.

Progress and errors go to standard error, results to standard output. Exit codes: 0 all done, 1 some queries
failed, 2 bad usage or input, 130 interrupted.

What computes is imported inside the commands: help and usage errors come at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..errors import AtlasSegError, InputError, MissingExtraError
from .benchmark import app as benchmark_app
from .evaluation import evaluate
from .models import app as models_app
from .report import report, report_on, require_pictures
from .session import (
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AcceptOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ModelPathOption,
    PromptOption,
    QuietOption,
    SeedOption,
    Session,
    SetOption,
    accept_licences,
    build_settings,
    open_session,
    or_none,
    print_json,
    print_table,
    score_text,
    sentence,
)
from .suggest import suggest

if TYPE_CHECKING:
    from ..context import Context
    from ..models import Segmenter
    from ..pipeline import Settings

logger = logging.getLogger(__name__)

#: Tables that rich lays out are as wide as this where they go into a file or a pipe.
_PIPED_WIDTH = 160
#: Shells report a process that a signal ended as 128 + the signal's number.
_SIGNALLED = 128

app = typer.Typer(
    name="atlassegfm",
    help="One annotated scan (the atlas) segments every other scan of its kind (the queries).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"atlassegfm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def segment(
    queries: Annotated[
        list[Path], typer.Argument(metavar="QUERY...", help="Scans to segment: image files, or folders of them.")
    ],
    atlas: Annotated[Path, typer.Option("--atlas", metavar="IMG", help="The annotated scan.")],
    labels: Annotated[Path, typer.Option("--labels", metavar="LAB", help="Its label map, on the same voxels.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder that gets one folder per query.")],
    names: Annotated[
        Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
    ] = None,
    model: ModelOption = None,
    model_path: ModelPathOption = None,
    accept_licence: AcceptOption = False,
    prompt: PromptOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Also write atlas, model and probability maps, and the transform.")
    ] = False,
    write_report: Annotated[
        bool,
        typer.Option("--report", help="Also write OUT/report.html and a page for each case; keeps what --keep keeps."),
    ] = False,
    transform: Annotated[
        Path | None,
        typer.Option(
            "--transform",
            metavar="PATH",
            help="Take a saved transform from query to atlas and do not register: a transform file, a folder as --keep "
            "writes it, or a folder of results made with --keep.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment scans by one annotated scan.

    Each query gets a folder of its name in OUT, with segmentation.nii.gz (on the query's own voxels) and
    run.json (what was done).
    """
    with open_session(quiet) as session:
        from ..pipeline import load_chosen, prompt_kind, resolve_device
        from ..registration import require_engine
        from ..results import output_folder

        settings = build_settings(config, overrides, model=model, model_path=model_path, prompt=prompt, seed=seed)
        prompt_kind(settings)
        if write_report:
            require_pictures()
        if transform is None:
            require_engine(settings.registration)
        inputs = [path for path in (atlas, labels, names, config, model_path) if path is not None]
        jobs = _plan(queries, out, inputs, transform)
        resolved = resolve_device(device)
        if accept_licence:
            accept_licences([settings.model], session)
        with output_folder(out):
            session.progress("reading the atlas")
            loaded = load_chosen(settings, resolved)
            from ..context import Context

            context = Context.from_files(atlas, labels, names)
            done, failed = _segment_all(jobs, context, settings, resolved, loaded, session, keep=keep or write_report)
            if write_report and done:
                report_on(out, [job.query for job in jobs], session)
    if as_json:
        failures = [{"query": failure.job.query.name, "reason": failure.reason} for failure in failed]
        print_json({"results": done, "failures": failures})
    else:
        for run in done:
            _print_run(run)
    if failed:
        if len(jobs) > 1:
            listed = ", ".join(str(failure.job.query) for failure in failed)
            session.error(f"{len(failed)} of {len(jobs)} queries failed: {listed}")
        # Where every query is bad input, the call was wrong as a whole.
        raise typer.Exit(EXIT_USAGE if all(failure.is_input for failure in failed) and not done else EXIT_FAILURES)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="Folder for the scans and the result.")
    ] = Path("atlassegfm-demo"),
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Draw OUT/demo.png (extra 'report').")] = True,
    device: DeviceOption = "auto",
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do the whole job on two made-up scans; nothing to download."""
    with open_session(quiet) as session:
        if picture:
            from ..report import require_report_extra

            try:
                require_report_extra()
            except MissingExtraError as error:
                raise InputError(f"{error}, or use --no-picture") from None
        from ..demo import ATLAS, LABELS, QUERY, run_demo
        from ..pipeline import prompt_kind, resolve_device

        settings = build_settings(None, overrides, seed=seed)
        prompt_kind(settings)
        resolved = resolve_device(device)
        outcome = run_demo(out, settings, device=resolved, picture=picture, on_stage=session.progress)
    means = outcome.means()
    if as_json:
        scores = [
            {
                "name": s.structure.name,
                "atlas": or_none(s.atlas),
                "model": or_none(s.model),
                "fused": or_none(s.fused),
            }
            for s in outcome.scores
        ]
        mean = dict(zip(("atlas", "model", "fused"), (or_none(value) for value in means), strict=True))
        print_json({"dice": {"structures": scores, "mean": mean}, "run": outcome.run})
        return
    rows: list[tuple[str, ...]] = [
        (s.structure.name, score_text(s.atlas), score_text(s.model), score_text(s.fused)) for s in outcome.scores
    ]
    rows.append(("mean", *(score_text(mean) for mean in means)))
    typer.echo("Dice against the true labels")
    print_table(("structure", "atlas only", "model", "fused"), rows, numbers_from=1)
    command = ["atlassegfm", "segment", "--atlas", str(out / "data" / ATLAS), "--labels", str(out / "data" / LABELS)]
    command += [str(out / "data" / QUERY), "-o", str(out / "result")]
    for assignment in overrides or ():
        command += ["--set", assignment]
    if seed is not None:
        command += ["--seed", str(seed)]
    typer.echo(f"\nresult    {out / 'result'}")
    if picture:
        typer.echo(f"picture   {out / 'demo.png'}")
    typer.echo(f"repeat    {shlex.join(command)}")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Scans and label maps.")],
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong with scans and label maps, and how to mend it.

    The exit code is 2 if a file could not be used.
    """
    with open_session(quiet=True, warnings=False):
        from .. import doctor

        result = doctor.check(file for path in files for file in _files(path))
    if as_json:
        print_json(result.to_dict())
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = _PIPED_WIDTH
        console.print(doctor.as_table(result))
    if result.worst == "error":
        raise typer.Exit(EXIT_USAGE)


app.command()(evaluate)
app.command()(report)
app.command()(suggest)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(models_app, name="models")


@app.command()
def settings(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Print all settings as TOML, with what they mean."""
    with open_session(quiet=True):
        from ..settings import to_toml

        text = to_toml(build_settings(config, overrides))
    typer.echo(text, nl=False)


def main() -> NoReturn:
    """Run the command line and exit."""
    # PyTorch's threads spin while they wait for each other. On a machine with other work, two threads on two cores
    # then took 140 s for a pair that takes 25 s when they sleep. Read when PyTorch is loaded, so set first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = typer.main.get_command(app).main(prog_name="atlassegfm", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"error: {sentence(error.format_message())}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == EXIT_INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(code or 0)


# One query after the other


@dataclass(frozen=True)
class _Job:
    """A query, the folder of its result, and the transform to take instead of registering."""

    query: Path
    folder: Path
    transform: Path | None = None


@dataclass(frozen=True)
class _Failure:
    """Why there is no result, and whether the query itself is to blame."""

    job: _Job
    reason: str
    is_input: bool


def _plan(queries: Sequence[Path], out: Path, inputs: Sequence[Path], transform: Path | None) -> list[_Job]:
    """Which files are to be segmented and where the results go; checked before anything is computed."""
    from ..image import image_stem
    from ..results import RESULT_NAMES, check_replaceable

    jobs: dict[str, _Job] = {}
    for query in [file for path in queries for file in _files(path)]:
        stem = image_stem(query)
        if not stem:
            raise InputError(f"{query}: the file has no name before its ending; rename it")
        if stem in jobs:
            raise InputError(
                f"{query}: its result would go to {out / stem}, as that of {jobs[stem].query}; "
                "rename one, or segment them in two calls"
            )
        jobs[stem] = _Job(query, out / stem)
    if transform is not None:
        jobs = {stem: replace(job, transform=_transform_of(stem, jobs, transform)) for stem, job in jobs.items()}
        inputs = (*inputs, *(job.transform for job in jobs.values() if job.transform is not None))
    for job in jobs.values():
        target = job.folder.resolve()
        for path in (*(other.query for other in jobs.values()), *inputs):
            if path.resolve().is_relative_to(target):
                raise InputError(
                    f"{path}: would be overwritten, as the result of {job.query} goes to {job.folder}; "
                    "choose another output folder"
                )
        if out.exists() and out.resolve() == job.query.resolve():
            raise InputError(f"{out}: is the query and would be overwritten; choose another output folder")
        check_replaceable(job.folder, RESULT_NAMES)
    return list(jobs.values())


def _transform_of(stem: str, jobs: Mapping[str, _Job], given: Path) -> Path:
    """Where the transform of a query lies: what was given, or what belongs to it in a folder of results."""
    from ..itk import is_transform

    if not given.exists():
        raise InputError(f"{given}: no such file or folder; expected a saved transform")
    if is_transform(given):
        if len(jobs) > 1:
            raise InputError(
                f"{given}: one transform for {len(jobs)} queries, and each needs its own; give one query, or a folder "
                "of results made with --keep"
            )
        return given
    belonging = given / stem / "transform"
    if not is_transform(belonging):
        raise InputError(
            f"{given}: no transform for {jobs[stem].query}; expected {belonging} (in a folder of results made with "
            "--keep), or give a transform folder or file"
        )
    return belonging


def _files(path: Path) -> list[Path]:
    """The file itself, or the image files of a folder."""
    from ..image import IMAGE_SUFFIXES, image_suffix

    if not path.is_dir():
        return [path]
    try:
        found = sorted(
            file for file in path.iterdir() if image_suffix(file) and file.is_file() and not file.name.startswith(".")
        )
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be read ({error.strerror}); check the permissions") from None
    if not found:
        raise InputError(f"{path}: no image file in this folder; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _segment_all(
    jobs: Sequence[_Job],
    context: Context,
    settings: Settings,
    device: str,
    model: Segmenter | None,
    session: Session,
    *,
    keep: bool,
) -> tuple[list[dict[str, Any]], list[_Failure]]:
    """What was written to each ``run.json``, and what failed; a failure does not stop the others."""
    done, failed = [], []
    for number, job in enumerate(jobs, start=1):
        session.begin(number, len(jobs), job.query.name)
        try:
            done.append(_segment_one(job, context, settings, device, model, session, keep=keep))
        except AtlasSegError as error:
            reason = str(error)
            if not reason.startswith(str(job.query)):
                reason = f"{job.query}: {reason}"
            session.error(reason)
            failed.append(_Failure(job, reason, isinstance(error, InputError)))
        except Exception as error:
            # A defect of this program: one scan that meets it must not cost the results of all others.
            if len(jobs) == 1:
                raise
            logger.exception("%s: unexpected error", job.query)
            failed.append(_Failure(job, f"{job.query}: unexpected error ({error!r})", is_input=False))
    return done, failed


def _segment_one(
    job: _Job,
    context: Context,
    settings: Settings,
    device: str,
    model: Segmenter | None,
    session: Session,
    *,
    keep: bool,
) -> dict[str, Any]:
    from .. import pipeline
    from ..image import load_image
    from ..itk import read_transform
    from ..results import RunInputs, write_result

    session.progress("reading")
    transform = None if job.transform is None else read_transform(job.transform)
    query = load_image(job.query)
    result = pipeline.segment(
        context, query, settings, device=device, on_stage=session.progress, model=model, transform=transform
    )
    session.progress("writing")
    run = write_result(result, RunInputs(context, query, job.transform), job.folder, keep=keep)
    return {"query": job.query.name, "output": str(job.folder), **run}


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End by an exception, so that nothing unfinished is left behind when a cluster ends the job."""
    raise SystemExit(_SIGNALLED + number)


def _print_run(run: dict[str, Any]) -> None:
    rows = [
        (
            one["name"],
            f"{one['volume_ml']:.1f}",
            "" if one["round_trip_dice"] is None else f"{one['round_trip_dice']:.2f}",
            one["status"] + (f" ({one['reason']})" if one.get("reason") else ""),
        )
        for one in run["structures"]
    ]
    typer.echo(f"{run['query']} -> {run['output']}  ({run['total_seconds']:.1f} s on {run['device']})")
    print_table(("structure", "volume ml", "round trip", "status"), rows, numbers_from=1, numbers_to=3)
