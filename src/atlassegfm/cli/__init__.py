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
from .customization import customize
from .evaluation import evaluate
from .models import app as models_app
from .session import (
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AcceptOption,
    AtlasSeriesOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ModelPathOption,
    NamesOption,
    OverlapOption,
    PromptOption,
    QuietOption,
    SeedOption,
    SeriesOption,
    Session,
    SetOption,
    StructuresOption,
    SynonymsOption,
    accept_licences,
    build_selection,
    build_settings,
    open_session,
    or_none,
    print_json,
    print_table,
    score_text,
    sentence,
    split_list,
)

if TYPE_CHECKING:
    from ..context import Context
    from ..customization import Customization
    from ..fusion import Gate
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
        list[Path],
        typer.Argument(
            metavar="QUERY...", help="Scans to segment: image files, DICOM series folders, or folders of them."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder that gets one folder per query.")],
    atlas: Annotated[Path | None, typer.Option("--atlas", metavar="IMG", help="The annotated scan.")] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="LAB", help="Its label map, RTSTRUCT or DICOM-SEG.")
    ] = None,
    names: NamesOption = None,
    context: Annotated[
        Path | None,
        typer.Option(
            "--context", metavar="CTX", help="A folder that `atlassegfm customize` wrote, instead of atlas and labels."
        ),
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
    transform: Annotated[
        Path | None,
        typer.Option(
            "--transform",
            metavar="PATH",
            help="Take a saved transform from query to atlas and do not register: a transform file, a folder as --keep "
            "writes it, or a folder of results made with --keep.",
        ),
    ] = None,
    series: SeriesOption = None,
    atlas_series: AtlasSeriesOption = None,
    structures: StructuresOption = None,
    synonyms: SynonymsOption = None,
    overlap: OverlapOption = "refuse",
    formats: Annotated[
        str,
        typer.Option(
            "--format", metavar="A,B,...", help="What to write: nifti, and for DICOM series rtstruct and seg."
        ),
    ] = "nifti",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment scans by one annotated scan.

    Each query gets a folder of its name in OUT, with segmentation.nii.gz (on the query's own voxels) and
    run.json (what was done).
    """
    with open_session(quiet) as session:
        _check_atlas_options(atlas, labels, names, context)
        from ..pipeline import load_chosen, prompt_kind, resolve_device
        from ..registration import require_engine
        from ..results import check_formats, output_folder

        customization = None
        if context is not None:
            from ..customization import Customization

            session.progress("reading the context")
            customization = Customization.load(context)
        base = None if customization is None else customization.settings
        settings = build_settings(
            config, overrides, model=model, model_path=model_path, prompt=prompt, seed=seed, base=base
        )
        if customization is not None:
            customization.check_settings(settings)
        prompt_kind(settings)
        if transform is None:
            require_engine(settings.registration)
        given = (atlas, labels, names, context, config, model_path, synonyms)
        inputs = [path for path in given if path is not None]
        if context is not None and out.resolve().is_relative_to(context.resolve()):
            raise InputError(f"{out}: is inside the context {context}; choose another output folder")
        selection = build_selection(structures, synonyms, overlap)
        wanted = split_list(formats, "--format")
        check_formats(wanted)
        jobs = _plan(queries, out, inputs, transform)
        resolved = resolve_device(device)
        if accept_licence:
            accept_licences([settings.model], session)
        with output_folder(out):
            if customization is None:
                session.progress("reading the atlas")
            loaded = load_chosen(settings, resolved)
            if customization is not None:
                customization.check_model(loaded)
                setup = _Setup(customization.context, settings, resolved, loaded, customization)
            else:
                from ..context import Context

                # For the type checker: without a context both are there.
                if atlas is None or labels is None:
                    raise TypeError("neither an atlas nor a context")
                annotated = Context.from_files(atlas, labels, names, series=atlas_series, selection=selection)
                setup = _Setup(annotated, settings, resolved, loaded)
            done, failed = _segment_all(jobs, setup, session, _Output(keep, wanted, series))
    if as_json:
        failures = [{"query": _name(failure.job.query), "reason": failure.reason} for failure in failed]
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
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Scans, label maps, DICOM series folders, RTSTRUCT, DICOM-SEG."),
    ],
    series: SeriesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong with scans and label maps, and how to mend it.

    The exit code is 2 if a file could not be used.
    """
    with open_session(quiet=True, warnings=False):
        from .. import doctor

        result = doctor.check((file for path in files for file in _files(path)), series)
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


app.command()(customize)
app.command()(evaluate)
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


@dataclass(frozen=True, eq=False)
class _Setup:
    """What all queries share: the atlas, settings, the model, and the context they come from, where one was given."""

    context: Context
    settings: Settings
    device: str
    model: Segmenter | None
    customization: Customization | None = None


@dataclass(frozen=True)
class _Output:
    """What is written besides run.json, and which series of DICOM queries is read."""

    keep: bool
    formats: tuple[str, ...]
    series: str | None


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
        stem = _name(query) if query.is_dir() else image_stem(query)
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


def _name(path: Path) -> str:
    """The name of a file or folder, also of "."."""
    return path.name or path.resolve().name


def _files(path: Path) -> list[Path]:
    """The file itself, the image files of a folder, the folder itself if it is a DICOM series, or those in it."""
    from ..dicom import is_series_folder
    from ..image import IMAGE_SUFFIXES, image_suffix

    if not path.is_dir():
        return [path]
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        found = [entry for entry in entries if image_suffix(entry) and entry.is_file()]
        if is_series_folder(path):
            if found:
                raise InputError(
                    f"{path}: holds image files ({found[0].name}) and DICOM files; name the image files one by one, or "
                    "give the DICOM series a folder of its own"
                )
            return [path]
        found = found or [entry for entry in entries if entry.is_dir() and is_series_folder(entry)]
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be read ({error.strerror}); check the permissions") from None
    if not found:
        raise InputError(
            f"{path}: no image file in this folder; expected files ending in {', '.join(IMAGE_SUFFIXES)}, or those of "
            "a DICOM series"
        )
    return found


def _segment_all(
    jobs: Sequence[_Job], setup: _Setup, session: Session, output: _Output
) -> tuple[list[dict[str, Any]], list[_Failure]]:
    """What was written to each ``run.json``, and what failed; a failure does not stop the others."""
    done, failed = [], []
    gate = None if setup.customization is None else setup.customization.gate
    for number, job in enumerate(jobs, start=1):
        session.begin(number, len(jobs), _name(job.query))
        try:
            run, trained = _segment_one(job, setup, gate, session, output)
            done.append(run)
            if setup.settings.fusion.examples == "simulated":
                gate = trained  # on the atlas alone: the first query pays for all
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
    job: _Job, setup: _Setup, gate: Gate | None, session: Session, output: _Output
) -> tuple[dict[str, Any], Gate | None]:
    """What was written to ``run.json``, and the gate that was used."""
    from .. import pipeline
    from ..dicom import open_image
    from ..itk import read_transform
    from ..results import RunInputs, check_formats, write_result

    session.progress("reading")
    transform = None if job.transform is None else read_transform(job.transform)
    query = open_image(job.query, output.series if job.query.is_dir() else None)
    check_formats(output.formats, query)
    result = pipeline.segment(
        setup.context,
        query,
        setup.settings,
        device=setup.device,
        on_stage=session.progress,
        model=setup.model,
        transform=transform,
        gate=gate,
    )
    session.progress("writing")
    saved = None if setup.customization is None else setup.customization.summary()
    inputs = RunInputs(setup.context, query, job.transform, saved)
    run = write_result(result, inputs, job.folder, keep=output.keep, formats=output.formats)
    return {"query": _name(job.query), "output": str(job.folder), **run}, result.gate


def _check_atlas_options(atlas: Path | None, labels: Path | None, names: Path | None, context: Path | None) -> None:
    """Either an atlas with its labels, or a context."""
    given = {"--atlas": atlas, "--labels": labels, "--names": names}
    if context is not None:
        for option, path in given.items():
            if path is not None:
                raise InputError(f"{option} and --context do not go together: the context has its own atlas")
        return
    for option in ("--atlas", "--labels"):
        if given[option] is None:
            raise InputError(f"Missing option '{option}'; give --atlas and --labels, or --context")


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End by an exception, so that nothing unfinished is left behind when a cluster ends the job."""
    raise SystemExit(_SIGNALLED + number)


def _print_run(run: dict[str, Any]) -> None:
    went = any(one["round_trip_dice"] is not None for one in run["structures"])
    rows = []
    for one in run["structures"]:
        back = "" if one["round_trip_dice"] is None else f"{one['round_trip_dice']:.2f}"
        quality = one["quality"] or {"verdict": "", "estimated_dice": None, "reason": ""}
        estimate = quality["estimated_dice"]
        note = one["status"] + (f" ({one['reason']})" if one.get("reason") else "")
        if one["status"] == "present":
            note = quality["reason"] if quality["verdict"] != "good" else ""
        rows.append(
            (
                *(one["name"], f"{one['volume_ml']:.1f}", *([back] if went else [])),
                *("" if estimate is None else f"{estimate:.2f}", quality["verdict"], note),
            )
        )
    typer.echo(f"{run['query']} -> {run['output']}  ({run['total_seconds']:.1f} s on {run['device']})")
    head = ("structure", "volume ml", *(["round trip"] if went else []), "est. Dice", "verdict", "")
    print_table(head, rows, numbers_from=1, numbers_to=len(head) - 2)
