"""The commands ``benchmark ...``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import InputError
from .evaluation import (
    DEFAULT_TOLERANCE_MM,
    CentrelineOption,
    LabelsOption,
    ToleranceOption,
    read_tolerance,
    split_list,
)
from .session import (
    EXIT_FAILURES,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    QuietOption,
    SeedOption,
    Session,
    SetOption,
    build_settings,
    open_session,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from ..benchmark import Variant
    from ..dataset import Dataset
    from ..pipeline import Settings

#: The subcommand meant where none is named.
_DEFAULT = "protocol"


class _DefaultGroup(TyperGroup):
    """Subcommands, and ``benchmark DATASET`` for the first of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name in front where no name is given."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [_DEFAULT, *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    help="Measure on a labelled dataset: `benchmark DATASET [--protocol ...]`, or one of the comparisons below.",
)

DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder in nnU-Net raw layout, with labels.")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of the benchmark; an interrupted one goes on.")
]
ProtocolOption = Annotated[
    str, typer.Option("--protocol", metavar="one-shot-5fold|one-to-all|all-pairs", help="Which atlas for which query.")
]
AtlasOption = Annotated[
    str | None, typer.Option("--atlas", metavar="A,B,...", help="Atlases of one-to-all [default: the first case].")
]
CasesOption = Annotated[str | None, typer.Option("--cases", metavar="A,B,...", help="Cases that take part.")]
EveryOption = Annotated[int, typer.Option("--every", metavar="N", help="A sample: one pair of N.")]
FoldsOption = Annotated[int, typer.Option("--folds", metavar="N", help="Of one-shot-5fold, where 5 are too many.")]
ChannelOption = Annotated[int, typer.Option("--channel", metavar="N", help="Channel of the scans.")]
PlotsOption = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (extra 'report').")]
ForceOption = Annotated[bool, typer.Option("--force", help="Begin anew where OUT holds results.")]


@app.command(_DEFAULT)
def protocol_command(
    dataset: DatasetArgument,
    out: OutOption,
    protocol: ProtocolOption = "one-shot-5fold",
    atlas: AtlasOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    every: EveryOption = 1,
    folds: FoldsOption = 5,
    models: Annotated[
        str | None, typer.Option("--models", metavar="A,B,...", help="Models side by side [default: builtin].")
    ] = None,
    engines: Annotated[
        str | None, typer.Option("--engines", metavar="A,B,...", help="Registration engines side by side.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE[;KEY=VALUE...]",
            help="Also with these settings, side by side; may be repeated.",
        ),
    ] = None,
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}",
    cldice: CentrelineOption = None,
    channel: ChannelOption = 0,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    plots: PlotsOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Atlas only, model, fused and oracle over the pairs of a protocol (what `benchmark DATASET` runs)."""
    with open_session(quiet) as session:
        from ..benchmark import Variant

        base = build_settings(config, overrides, seed=seed)
        made = [Variant("", base)]
        if models is not None:
            made = [_with(one, model, model=model) for one in made for model in split_list(models, "--models")]
        if engines is not None:
            names = split_list(engines, "--engines")
            made = [_with(one, engine, registration={"engine": engine}) for one in made for engine in names]
        if variants:
            made += [_parsed(text, base) for text in variants]
        made = [replace(one, name=one.name or "default") for one in made]
        failed = _run(
            session,
            dataset,
            out,
            f"{protocol}",
            made,
            _Choice(protocol, atlas, cases, labels, every, folds, tolerance, cldice, channel),
            seed=base.seed,
            device=device,
            plots=plots,
            force=force,
            as_json=as_json,
        )
    _leave(failed)


@app.command()
def ablation(
    dataset: DatasetArgument,
    out: OutOption,
    protocol: ProtocolOption = "all-pairs",
    atlas: AtlasOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    every: EveryOption = 1,
    folds: FoldsOption = 5,
    model: ModelOption = None,
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}",
    cldice: CentrelineOption = None,
    channel: ChannelOption = 0,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    plots: PlotsOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The paper's Table 4: stages of the registration off and on; the model alone, with prompts, with fusion.

    "user click" is the model alone: a simulated user, who sees the structure, clicks once into its middle.
    """
    with open_session(quiet) as session:
        from ..benchmark import METHODS, Variant
        from ..pipeline import NO_MODEL

        base = build_settings(config, overrides, model=model, seed=seed)
        if base.model == NO_MODEL:
            raise InputError("an ablation needs a model; leave out --model none")
        stages = {
            "deformable": {"rigid": False, "affine": False},
            "rigid": {"affine": False, "deformable": False},
            "rigid, deformable": {"affine": False},
            "rigid, affine": {"deformable": False},
        }
        alone = replace(base, model=NO_MODEL)
        made = [_with(Variant("", alone), name, registration=table) for name, table in stages.items()]
        made += [
            Variant("user click", base, prompts_from="user", methods=("model",)),
            Variant("all stages", base, methods=METHODS),
        ]
        failed = _run(
            session,
            dataset,
            out,
            f"ablation, {protocol}",
            made,
            _Choice(protocol, atlas, cases, labels, every, folds, tolerance, cldice, channel),
            seed=base.seed,
            device=device,
            plots=plots,
            force=force,
            as_json=as_json,
        )
    _leave(failed)


@app.command()
def prompts(
    dataset: DatasetArgument,
    out: OutOption,
    protocol: ProtocolOption = "all-pairs",
    atlas: AtlasOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    every: EveryOption = 1,
    folds: FoldsOption = 5,
    models: Annotated[
        str, typer.Option("--models", metavar="A,B,...", help="Models, each with all the prompts it takes.")
    ] = "builtin",
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}",
    cldice: CentrelineOption = None,
    channel: ChannelOption = 0,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    plots: PlotsOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The paper's Table 6: click, box and mask from the warped atlas, for each model that takes them."""
    with open_session(quiet) as session:
        from ..benchmark import Variant
        from ..models import describe_model

        base = build_settings(config, overrides, seed=seed)
        made = [
            _with(Variant("", base, methods=("model", "fused")), f"{model} {kind}", model=model, prompt=kind)
            for model in split_list(models, "--models")
            for kind in ("click", "box", "mask")
            if kind in describe_model(model).prompts
        ]
        failed = _run(
            session,
            dataset,
            out,
            f"prompts, {protocol}",
            made,
            _Choice(protocol, atlas, cases, labels, every, folds, tolerance, cldice, channel),
            seed=base.seed,
            device=device,
            plots=plots,
            force=force,
            as_json=as_json,
        )
    _leave(failed)


@app.command()
def engines(
    dataset: DatasetArgument,
    out: OutOption,
    protocol: ProtocolOption = "all-pairs",
    atlas: AtlasOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    every: EveryOption = 1,
    folds: FoldsOption = 5,
    engines: Annotated[
        str | None, typer.Option("--engines", metavar="A,B,...", help="Registration engines [default: all there are].")
    ] = None,
    model: ModelOption = None,
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}",
    cldice: CentrelineOption = None,
    channel: ChannelOption = 0,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    plots: PlotsOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The paper's Table 7: registration engines, alternating on the same pairs so that their times compare."""
    with open_session(quiet) as session:
        from ..benchmark import Variant
        from ..registration import ENGINES

        base = build_settings(config, overrides, model=model, seed=seed)
        names = tuple(ENGINES) if engines is None else split_list(engines, "--engines")
        made = [
            _with(Variant("", base, methods=("atlas", "fused")), engine, registration={"engine": engine})
            for engine in names
        ]
        failed = _run(
            session,
            dataset,
            out,
            f"engines, {protocol}",
            made,
            _Choice(protocol, atlas, cases, labels, every, folds, tolerance, cldice, channel),
            seed=base.seed,
            device=device,
            plots=plots,
            force=force,
            as_json=as_json,
        )
    _leave(failed)


@app.command("time")
def time_command(
    dataset: Annotated[
        Path | None,
        typer.Argument(metavar="[DATASET]", help="Its first two cases; made-up scans if left out."),
    ] = None,
    labels: LabelsOption = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Repeat; the median counts.")] = 3,
    shape: Annotated[str, typer.Option("--shape", metavar="IxJxK", help="Voxels of both scans.")] = "256x256x240",
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The paper's Table 5: seconds and fitted numbers of each stage on scans of 256 x 256 x 240 voxels."""
    with open_session(quiet) as session:
        from ..benchmark.timing import measure, scans_for
        from ..pipeline import resolve_device

        base = build_settings(config, overrides, model=model, seed=seed)
        session.progress("making the scans")
        context, query = scans_for(dataset, _shape(shape), split_list(labels, "--labels"), base.seed)
        timing = measure(context, query, base, device=resolve_device(device), rounds=rounds, on_stage=session.progress)
    if as_json:
        print_json(timing.to_dict())
        return
    sizes = " x ".join(str(n) for n in query.grid.shape)
    source = "made-up scans" if dataset is None else dataset.name
    plural = "run" if rounds == 1 else "runs"
    typer.echo(
        f"{sizes} voxels ({source}), {len(context.structures)} structures, {timing.device}, "
        f"median of {rounds} {plural}; peak {timing.peak_memory_mb} MB"
    )
    rows = [
        (one.name, f"{one.seconds:.2f}", "" if one.parameters is None else str(one.parameters)) for one in timing.stages
    ]
    print_table(("stage", "seconds", "fitted numbers"), rows, numbers_from=1)


class _Choice:
    """Which pairs and structures, as the user says."""

    def __init__(
        self,
        protocol: str,
        atlas: str | None,
        cases: str | None,
        labels: str | None,
        every: int,
        folds: int,
        tolerance: str,
        cldice: str | None,
        channel: int,
    ) -> None:
        self.protocol, self.every, self.folds, self.channel = protocol, every, folds, channel
        self.atlases = split_list(atlas, "--atlas")
        self.cases = split_list(cases, "--cases")
        self.labels = split_list(labels, "--labels")
        self.centreline = split_list(cldice, "--cldice")
        self.tolerances = read_tolerance(tolerance)

    def title(self, text: str) -> str:
        """What is run, with what is left out."""
        return f"{text}, one of {self.every}" if self.every > 1 else text

    def dataset(self, folder: Path) -> Dataset:
        """The cases that take part."""
        from ..dataset import load_dataset

        dataset = load_dataset(folder, channel=self.channel)
        return dataset.select(self.cases) if self.cases else dataset


def _run(
    session: Session,
    folder: Path,
    out: Path,
    title: str,
    variants: Sequence[Variant],
    choice: _Choice,
    *,
    seed: int,
    device: str,
    plots: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Run a benchmark and print its table; the number of pairs that failed."""
    from ..benchmark import Plan, make_pairs, run, write_reports
    from ..benchmark.tables import columns_of, main_table
    from ..dataset import pick_structures
    from ..pipeline import prompt_kind, resolve_device

    if plots:
        from ..report import require_report_extra

        require_report_extra()
    names = [one.name for one in variants]
    if len(set(names)) < len(names):
        raise InputError(f"two variants have the same name ({', '.join(names)}); name each once")
    for one in variants:
        prompt_kind(one.settings)
    dataset = choice.dataset(folder)
    values = pick_structures(dataset, choice.labels or ["*"])
    centreline = pick_structures(dataset, choice.centreline) if choice.centreline else ()
    cases = [case.name for case in dataset.cases]
    pairs = make_pairs(
        cases, choice.protocol, seed=seed, folds=choice.folds, atlases=choice.atlases, every=choice.every
    )
    plan = Plan(
        choice.title(title),
        dataset,
        pairs,
        tuple(variants),
        values,
        choice.tolerances,
        tuple(value for value in centreline if value in values),
        seed,
        resolve_device(device),
        shlex.join(["atlassegfm", *sys.argv[1:]]),
    )
    session.say(f"{dataset.name}: {len(pairs)} pairs of {len(cases)} cases: {', '.join(cases)}")
    session.say(f"structures: {', '.join(f'{name} ({value})' for value, name in plan.names.items())}")
    left = [name for value, name in dataset.structures.items() if value not in values]
    if left:
        session.say(f"left out on request: {', '.join(left)}")
    records = run(plan, out, force=force, on_pair=session.begin_pair, on_stage=session.progress)
    session.progress("tables")
    summary = write_reports(plan, records, out, plots=plots)
    if as_json:
        print_json(summary)
    else:
        head, *rows = main_table(columns_of(plan, records))
        print_table(head, rows, numbers_from=len(head) - 5)
        typer.echo(f"\nreport    {out / 'report.md'}")
    return sum(bool(record.failure) for record in records)


def _leave(failed: int) -> None:
    if failed:
        raise typer.Exit(EXIT_FAILURES)


def _with(variant: Variant, name: str, **table: Any) -> Variant:
    """A variant with other settings and a longer name."""
    from ..settings import with_table

    settings: Settings = with_table(variant.settings, table, origin=name)
    return replace(variant, name=f"{variant.name} {name}".strip(), settings=settings)


def _parsed(text: str, base: Settings) -> Variant:
    """``NAME:KEY=VALUE;KEY=VALUE`` as a variant."""
    from ..benchmark import Variant
    from ..settings import with_overrides

    name, colon, rest = text.partition(":")
    assignments = [part.strip() for part in rest.split(";") if part.strip()]
    if not colon or not name.strip() or not assignments:
        raise InputError(f"--variant {text}: expected NAME:KEY=VALUE, with semicolons between several")
    return Variant(name.strip(), with_overrides(base, assignments, option=f"--variant {name}:"))


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= 8 for part in parts):
        raise InputError(f"--shape {text}: expected three numbers of voxels of at least 8, as 256x256x240")
    i, j, k = (int(part) for part in parts)
    return i, j, k
