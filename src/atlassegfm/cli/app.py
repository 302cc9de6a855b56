"""The command line: arguments to volumes and settings, results to tables and exit codes.

Progress and errors go to standard error, results to standard output. Exit codes: 0 all done, 1 some queries
failed, 2 bad usage or input, 130 interrupted.

What computes is imported inside the commands: help and usage errors come at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..core.errors import AtlasSegError, InputError, MissingExtraError
from ..core.parallel import NUMPY_THREADS
from .benchmark import app as benchmark_app
from .cohort import (
    ClusterOption,
    ClusterOptionsOption,
    CohortOptions,
    ForceOption,
    ShardOption,
    ThreadsOption,
    WorkersOption,
    segment_cohort,
    tell_outcome,
)
from .customize import customize
from .evaluate import evaluate
from .models import app as models_app
from .report import report, report_on, require_pictures
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
from .suggest import suggest

if TYPE_CHECKING:
    from ..jobs import Case, Output
    from ..jobs.work import ContextSource
    from ..settings import Settings


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
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    shard: ShardOption = None,
    cluster: ClusterOption = None,
    cluster_options: ClusterOptionsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Segment scans by one annotated scan.

    Each query gets a folder of its name in OUT, with segmentation.nii.gz (on the query's own voxels),
    run.json (what was done) and status.json (how it went). Given several queries, or a folder, only those
    are segmented whose result is missing or was made with other files, settings or program.
    """
    with open_session(quiet) as session:
        _check_atlas_options(atlas, labels, names, context)
        from ..core.device import resolve_device
        from ..core.files import output_folder
        from ..jobs.results import check_formats
        from ..models.choice import prompt_kind
        from ..registration import require_engine

        options = CohortOptions(workers, threads, force, shard, cluster, cluster_options or ())
        options.check()
        base = None
        if context is not None:
            from ..context import Context

            session.progress("reading the context")
            customization = Context.load(context)
            base = customization.settings
        settings = build_settings(
            config, overrides, model=model, model_path=model_path, prompt=prompt, seed=seed, base=base
        )
        if context is not None:
            customization.check_settings(settings)
        prompt_kind(settings)
        if write_report:
            require_pictures()
        if transform is None:
            require_engine(settings.registration)
        selection = build_selection(structures, synonyms, overlap)
        wanted = split_list(formats, "--format")
        check_formats(wanted)
        if context is not None and out.resolve().is_relative_to(context.resolve()):
            raise InputError(f"{out}: is inside the context {context}; choose another output folder")
        # Imported here: PyTorch is loaded below, and errors above come at once.
        from ..jobs import AtlasFiles, ContextFolder, Output, plan_cases

        given = (atlas, labels, names, context, config, model_path, synonyms)
        inputs = [path for path in given if path is not None]
        cases = plan_cases([file for path in queries for file in _files(path)], out, inputs, transform)
        elsewhere = cluster is not None and cluster != "local" and device == "cuda"
        resolved = device if elsewhere else resolve_device(device)
        if accept_licence:
            accept_licences([settings.model], session)
        output = Output(keep or write_report, wanted, series)
        if context is not None:
            source: ContextSource = ContextFolder(context)
        elif atlas is not None and labels is not None:
            source = AtlasFiles(atlas, labels, names, atlas_series, selection)
        with output_folder(out):
            outcome = None
            if len(cases) > 1 or cases[0].query != queries[0] or options.wanted:
                outcome = segment_cohort(cases, out, source, settings, resolved, options, session, output=output)
            else:
                run = _segment_one(cases[0], out, source, settings, resolved, session, output=output, threads=threads)
            if write_report and (outcome is None or any((out / case.name / "run.json").exists() for case in cases)):
                report_on(out, [case.query for case in cases], session)
    if outcome is not None:
        tell_outcome(outcome, out, session, as_json=as_json)
    elif as_json:
        print_json({"results": [run], "failures": []})
    else:
        _print_run(run)


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
        from ..core.device import resolve_device
        from ..demo.run import ATLAS, LABELS, QUERY, run_demo
        from ..models.choice import prompt_kind

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
    context: Annotated[
        Path | None,
        typer.Option("--context", metavar="CTX", help="Compare scans with the atlas of this context folder too."),
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option("--atlas", metavar="IMG", help="The same with an annotated scan; needs --labels.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="LAB", help="Its label map, RTSTRUCT or DICOM-SEG.")
    ] = None,
    names: NamesOption = None,
    series: SeriesOption = None,
    atlas_series: AtlasSeriesOption = None,
    structures: StructuresOption = None,
    synonyms: SynonymsOption = None,
    overlap: OverlapOption = "refuse",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 where there is a warning, for scripts that stop at any doubt.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong with scans and label maps, and how to mend it.

    With --context, or --atlas and --labels, each scan is also fitted to the atlas (some seconds): are left and right
    swapped, is the contrast inverted, does it show the structures? The exit code is 2 if a file could not be used.
    """
    with open_session(quiet=True, warnings=False):
        from ..check import files as doctor

        annotated = None
        if any(one is not None for one in (context, atlas, labels, names)):
            _check_atlas_options(atlas, labels, names, context)
            selection = build_selection(structures, synonyms, overlap)
            if context is not None:
                from ..context import Context

                annotated = Context.load(context).context
            elif atlas is not None and labels is not None:
                from ..atlas import Atlas

                annotated = Atlas.from_files(atlas, labels, names, series=atlas_series, selection=selection)
        result = doctor.check((file for path in files for file in _files(path)), series, annotated)
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
    if strict and result.worst == "warning":
        raise typer.Exit(EXIT_FAILURES)


app.command()(customize)


app.command()(evaluate)


app.command()(report)


app.command()(suggest)


app.add_typer(benchmark_app, name="benchmark")


app.add_typer(models_app, name="models")


@app.command()
def settings(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Print all settings as TOML, with what they mean."""
    with open_session(quiet=True):
        from ..core.config import to_toml

        text = to_toml(build_settings(config, overrides))
    typer.echo(text, nl=False)


def main() -> NoReturn:
    """Run the command line and exit."""
    # PyTorch's threads spin while they wait for each other. On a machine with other work, two threads on two cores
    # then took 140 s for a pair that takes 25 s when they sleep. Read when PyTorch is loaded, so set first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(*NUMPY_THREADS)
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


def _name(path: Path) -> str:
    """The name of a file or folder, also of "."."""
    return path.name or path.resolve().name


def _files(path: Path) -> list[Path]:
    """The file itself, the image files of a folder, the folder itself if it is a DICOM series, or those in it."""
    from ..core.image import IMAGE_SUFFIXES, image_suffix
    from ..dicom import is_series_folder

    if not path.is_dir():
        return [path]
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        # A link that leads nowhere is a scan that is missing, and must be told of.
        found = [entry for entry in entries if image_suffix(entry) and (entry.is_file() or not entry.exists())]
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


def _segment_one(
    case: Case,
    out: Path,
    source: ContextSource,
    settings: Settings,
    device: str,
    session: Session,
    *,
    output: Output,
    threads: int | None,
) -> dict[str, Any]:
    """Segment a single query in any case; gives what was written to ``run.json`` and ``status.json``."""
    from ..jobs import SegmentWork
    from ..jobs.work import made_with

    session.progress("reading the atlas")
    work = SegmentWork(out, source, settings, device, threads, output, {})
    loaded = work.load()
    made = made_with(loaded.annotated, settings, device=device, threads=threads, output=output)
    loaded = replace(loaded, work=replace(work, made_with=made))
    session.begin(1, 1, case.query.name)
    try:
        run = loaded.segment(case, 1, session.progress)
    except AtlasSegError as error:
        reason = str(error)
        session.error(reason if reason.startswith(str(case.query)) else f"{case.query}: {reason}")
        raise typer.Exit(EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILURES) from None
    for doubt in run["doubts"]:
        session.say(f"warning: {case.query}: {doubt}")
    return {"query": _name(case.query), "output": str(out / case.name), **run}


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
