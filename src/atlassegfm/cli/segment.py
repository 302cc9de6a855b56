"""``atlassegfm segment``."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import InputError
from ..core.labels import listed
from .fields import argument, flag, option, options, required, series_option
from .options import AtlasOptions, DeviceOptions, ModelOptions, ScreenOptions, split_list
from .outcome import print_outcome, print_plan, print_result
from .progress import RunProgress
from .report import report_on, require_pictures
from .session import EXIT_FAILURES, EXIT_USAGE, Session

if TYPE_CHECKING:
    from ..context import Context
    from ..jobs import Case, Outcome, RunOptions, SegmentWork
    from ..jobs.run import Runner
    from ..jobs.work import ContextSource
    from ..settings import Settings

#: Threads of a case among several: fewer seconds for all of them than with more threads for each, and one number for
#: all machines, so that results do not depend on where they were made.
_COHORT_THREADS = 1
#: Failures named in the last line.
_NAMED = 10


@options
class SegmentOptions(ScreenOptions, DeviceOptions, ModelOptions, AtlasOptions):
    """Options of ``segment``."""

    queries: list[Path] = argument(
        "QUERY...", "Scans to segment: image files, DICOM series folders, or folders of them."
    )
    out: Path = required("--out -o OUT", "Folder that gets one folder per query.")
    series: str | None = series_option()
    entities: str | None = option(
        "--entities A,B,...",
        "Take these scans only of BIDS datasets, by entities and suffix as in file names: sub-01,ses-1,T1w.",
    )
    keep: bool = flag("--keep", "Also write atlas, model and probability maps, and the transform.")
    report: bool = flag("--report", "Also write OUT/report.html and a page for each case; keeps what --keep keeps.")
    transform: Path | None = option(
        "--transform PATH",
        "Take a saved transform from query to atlas and do not register: a transform file, a folder as --keep writes "
        "it, or a folder of results made with --keep.",
    )
    formats: str = option(
        "--format A,B,...",
        "What to write: nifti, nrrd, seg.nrrd (3D Slicer), mgz (FreeSurfer), masks (a file for each structure), and "
        "for DICOM series rtstruct and seg.",
        "nifti",
    )
    flat: Path | None = option("--flat DIR", "Also write DIR/CASE.nii.gz and dataset.json, the layout of nnU-Net.")
    csv: Path | None = option("--csv FILE", "Also write the table of all structures and cases there.")
    dry_run: bool = flag("--dry-run", "List what would be done, under which names, and what is left out; do nothing.")
    workers: int | None = option(
        "--workers N",
        "Scans to segment at a time, each in a process of its own [default: 1]. On GPUs at most one for each.",
        min=1,
    )
    threads: int | None = option(
        "--threads N",
        "Threads for each scan [default: 1 with several queries, all cores with one]. Another number moves borders a "
        "little.",
        min=1,
    )
    force: bool = flag("--force", "Segment all queries again; structures that a person accepted stay as they are.")
    second_pass: bool = option(
        "--second-pass/--no-second-pass",
        "Try structures that are not good again, with another scan of the cohort as the atlas; from five scans on.",
        True,
    )
    shard: str | None = option("--shard I/N", "Run the I-th of N parts of the queries, as one job of a job array.")
    cluster: str | None = option(
        "--cluster local|slurm|tcp://HOST:PORT",
        "Segment on a Dask cluster (extra 'cluster'): processes here, Slurm jobs, or a running scheduler.",
    )
    cluster_options: list[str] | None = option(
        "--cluster-option KEY=VALUE", "What a Slurm job asks for, as queue=gpu; may be repeated."
    )

    def check(self) -> None:
        """Refuse options that do not go together, before anything is read."""
        self.check_atlas()
        if self.shard is not None:
            self.batch()  # refuses what is no shard
        if self.cluster is not None:
            from ..jobs.cluster import parse_options, require_cluster

            require_cluster(self.cluster)
            parse_options(self.cluster_options or ())
        if self.cluster_options and self.cluster != "slurm":
            raise InputError("--cluster-option: is for --cluster slurm; leave it out, or say which cluster")
        if self.csv is not None and (self.csv.is_dir() or not self.csv.parent.is_dir()):
            raise InputError(f"--csv {self.csv}: expected the name of a file in a folder that exists, ending in .csv")
        if self.flat is not None and "nifti" not in split_list(self.formats, "--format"):
            raise InputError("--flat: copies the NIfTI files; add nifti to --format")
        if self.context is not None and self.out.resolve().is_relative_to(self.context.resolve()):
            raise InputError(f"{self.out}: is inside the context {self.context}; choose another output folder")

    def batch(self) -> RunOptions:
        """Build the options of the run."""
        from ..jobs import RunOptions, parse_shard

        shard = None if self.shard is None else parse_shard(self.shard)
        return RunOptions(self.force, shard, self.workers or 1, self.cluster, self.second_pass)

    def other_inputs(self) -> list[Path]:
        """Files that are read besides the queries: no result may overwrite them."""
        given = (self.atlas, self.labels, self.names, self.context, self.config, self.synonyms, *self.weights_given)
        return [path for path in given if path is not None]


def segment(options: SegmentOptions) -> None:
    """Segment scans with one annotated scan.

    Each query gets a folder of its name in OUT, with segmentation.nii.gz (on the query's own voxels), run.json (what
    was done) and status.json (how it went); cohort.csv lists all structures. Only those are segmented whose result is
    missing, or was made from other files, settings or another version. Folders are searched for scans; what is not
    taken is named.
    """
    with options.session() as session:
        options.check()
        settings, context = _settings(options, session)
        wanted = split_list(options.formats, "--format")
        _check_installed(options, settings, wanted)
        # Imported here: PyTorch is loaded below, and errors above come at once.
        from .. import jobs
        from ..core.device import resolve_device
        from ..core.files import atomic_path, output_folder
        from ..jobs.run import plan_of

        inputs = options.other_inputs()
        entities = split_list(options.entities, "--entities")
        scans = jobs.find_scans(options.queries, inputs=inputs, entities=entities)
        if not options.dry_run:
            for remark in scans.remarks():
                session.say(remark)
        if options.series is not None and not any(query.is_dir() for query in scans.found):
            what = "chooses a series of a DICOM folder, and no query is one"
            raise InputError(f"--series {options.series}: {what}; leave it out")
        cases = jobs.plan_cases(scans.found, options.out, inputs, options.transform, replace_others=options.force)
        elsewhere = options.cluster not in (None, "local") and options.device == "cuda"
        device = options.device if elsewhere else resolve_device(options.device)
        options.accept(settings, session)
        output = jobs.Output(options.keep or options.report, wanted, options.series)
        source: ContextSource
        if options.context is not None:
            source = jobs.ContextFolder(options.context)
        elif options.atlas is not None and options.labels is not None:
            selection = options.selection()
            source = jobs.AtlasFiles(options.atlas, options.labels, options.names, options.atlas_series, selection)
        session.progress("reading the atlas")
        context = context or source.load(settings)
        threads = options.threads or (None if _is_single(options, cases) else _COHORT_THREADS)
        provenance = jobs.provenance_of(context, settings, device=device, threads=threads, output=output)
        work = jobs.SegmentWork(options.out, source, settings, device, threads, output, provenance)
        if options.dry_run:
            print_plan(plan_of(cases, work, options.batch()), scans, options.out, as_json=options.as_json)
            return
        with output_folder(options.out):
            outcome = _run(options, cases, work, context, session)
            page = None
            if options.report and any((options.out / case.name / "run.json").exists() for case in cases):
                page = report_on(options.out, {case.name: case.query for case in cases}, session).path
            if options.flat is not None:
                from ..jobs.flat import write_flat

                write_flat([row.case.name for row in outcome.rows.values() if row.state == "done"], work, options.flat)
    if options.csv is not None:
        with atomic_path(options.csv) as temporary:
            shutil.copyfile(options.out / f"{options.batch().summary}.csv", temporary)
    if not _is_single(options, cases) or (outcome.failed and options.as_json):
        print_outcome(outcome, options.out, options.batch().summary, as_json=options.as_json)
    elif not outcome.failed:
        print_result(cases[0], options.out, as_json=options.as_json)
    if page is not None and not options.as_json:
        typer.echo(f"report    {page}")
    _exit(outcome, session)


def _settings(options: SegmentOptions, session: Session) -> tuple[Settings, Context | None]:
    """Settings of the job; with a context, those of its gate and what the options change."""
    if options.context is None:
        return options.settings(), None
    from ..context import Context

    session.progress("reading the context")
    context = Context.load(options.context)
    settings = options.settings(context.settings)
    context.check_settings(settings)
    return settings, context


def _check_installed(options: SegmentOptions, settings: Settings, formats: tuple[str, ...]) -> None:
    """Check model, prompt, engine and formats before hours of work that need them."""
    from ..core.itk import require_itk_extra
    from ..jobs.store import check_formats
    from ..models.table import prompt_kind
    from ..registration import require_engine

    prompt_kind(settings)
    if options.report:
        require_pictures()
    if options.transform is None:
        require_engine(settings.registration)
    else:
        require_itk_extra("--transform")
    options.selection()
    check_formats(formats)


def _is_single(options: SegmentOptions, cases: list[Case]) -> bool:
    """Whether one query was named, not a folder: its result is shown in full."""
    return len(cases) == 1 and cases[0].query == options.queries[0]


def _run(options: SegmentOptions, cases: list[Case], work: SegmentWork, context: Context, session: Session) -> Outcome:
    from ..core.progress import query_steps
    from ..jobs import run
    from ..jobs.second_pass import FEWEST_CASES
    from ..settings import NO_MODEL

    runner, workers = _runner(work, context, options, session, len(cases))
    steps = query_steps(model=work.settings.model != NO_MODEL, gate=context.gate is None)
    progress = RunProgress(session, options.out, steps)
    batch = replace(options.batch(), workers=workers)
    if workers > 1 or options.cluster is not None or len(cases) >= FEWEST_CASES:
        batch = replace(batch, prepare=lambda work: work.with_gate(context, session.progress))
    try:
        return run(cases, work, runner, progress, batch)
    except (KeyboardInterrupt, SystemExit):
        done, left = progress.outcome.count("done"), progress.outcome.count("left")
        if len(cases) > 1:
            session.say(f"stopped: {done} done, {left} left; the same command continues from there")
        raise


def _runner(
    work: SegmentWork, context: Context, options: SegmentOptions, session: Session, count: int
) -> tuple[Runner, int]:
    """Choose who runs the cases, and how many at a time."""
    from ..jobs.pool import run_here, run_in_processes, visible_gpus

    workers = options.workers or 1
    if options.cluster is not None:
        from ..jobs.cluster import parse_options, run_on_cluster

        gpu = work.device == "cuda"
        if gpu and options.cluster == "local" and workers > 1:
            session.say("1 worker: a local cluster has one GPU; leave out --cluster to use all of this machine")
            workers = 1
        arguments: dict[str, Any] = {"kind": options.cluster, "workers": workers, "threads": work.threads or 1}
        arguments |= {"gpu": gpu, "options": parse_options(options.cluster_options or ())}
        return functools.partial(run_on_cluster, **arguments), workers
    gpus: list[str] = visible_gpus() if work.device == "cuda" else []
    if gpus and workers > len(gpus):
        session.say(f"{len(gpus)} workers instead of {workers}: one for each GPU")
        workers = len(gpus)
    if workers > 1:
        return functools.partial(run_in_processes, workers=workers, gpus=gpus), workers
    _suggest_workers(work, session, count)
    return functools.partial(run_here, context=context), 1


def _suggest_workers(work: SegmentWork, session: Session, count: int) -> None:
    from ..core.parallel import usable_cores

    cores = usable_cores()
    possible = min(cores // (work.threads or cores), count)
    if work.device == "cpu" and possible > 1:
        text = f"1 worker; --workers {possible} would use all {cores} cores, with the same results and {possible} times"
        session.note(f"{text} the memory")


def _exit(outcome: Outcome, session: Session) -> None:
    failed = outcome.failed
    if not failed:
        return
    if len(outcome.rows) > 1:
        named = listed([str(row.case.query) for row in failed], _NAMED)
        session.error(f"{len(failed)} of {len(outcome.rows)} queries failed: {named}")
    if outcome.count("left"):
        session.error(f"stopped: {outcome.count('left')} not begun; the same command continues from there")
    # Where every query is bad input, the call was wrong as a whole.
    all_bad = all(row.is_input for row in failed) and not outcome.count("done")
    raise typer.Exit(EXIT_USAGE if all_bad else EXIT_FAILURES)
