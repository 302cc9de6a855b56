"""The commands ``benchmark ...``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from ..core.errors import InputError, MissingExtraError
from ..core.text import counted, did_you_mean
from .evaluate import cldice_option, labels_option, read_tolerance, tolerance_option
from .fields import argument, command, flag, option, options, required
from .help import HELP_OPTIONS, Group
from .options import DeviceOptions, ModelOptions, ScreenOptions, SettingsOptions, split_list
from .report import require_pictures
from .session import EXIT_FAILURES, accept_licences, print_json, print_table

if TYPE_CHECKING:
    from ..benchmark import Pair, Plan, Variant
    from ..settings import Settings


class _DefaultGroup(Group):
    """Subcommands, and ``benchmark DATASET`` for the first of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name in front where no name is given."""
        if args and args[0] not in (*self.commands, *HELP_OPTIONS):
            is_path = args[0].startswith("-") or Path(args[0]).exists()
            args = ["protocol", *args] if is_path or not did_you_mean(args[0], self.commands) else args
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    help="Measure on a labelled dataset: `benchmark DATASET [--protocol ...]`, or one of the comparisons below.",
)


@options
class BenchmarkOptions(ScreenOptions, DeviceOptions, SettingsOptions):
    """Options of all comparisons."""

    out: Path = required("--out -o OUT", "Folder of the benchmark; an interrupted one is continued.")
    tolerance: str = tolerance_option()
    model_path: Path | None = option("--model-path PATH", "File or folder of the model's weights.")
    accept_licence: bool = flag("--accept-licence", "Accept the licence of the models' weights; recorded once.")
    plots: bool = option("--plots/--no-plots", "Draw plots (extra 'report').", True)
    force: bool = flag("--force", "Begin again where OUT holds results.")

    def pairs(self, cases: Sequence[str], seed: int) -> tuple[Pair, ...]:
        """Make the pairs that are run, from the names of all cases."""
        raise NotImplementedError


@options
class DatasetOptions(BenchmarkOptions):
    """Options of comparisons on a dataset."""

    dataset: Path = argument("DATASET", "Folder in nnU-Net raw layout, with labels.")
    cases: str | None = option("--cases A,B,...", "Cases that take part.")
    labels: str | None = labels_option()
    cldice: str | None = cldice_option()
    channel: int = option("--channel N", "Channel of the scans.", 0)


@options
class PairOptions(DatasetOptions):
    """Options of comparisons on pairs of one atlas and a query."""

    protocol: str = option(
        "--protocol one-shot-5fold|one-to-all|all-pairs", "Which atlas for which query.", "one-shot-5fold"
    )
    atlas: str | None = option("--atlas A,B,...", "Atlases of one-to-all [default: the first case].")
    every: int = option("--every N", "Run a sample of the pairs, one of N.", 1)
    folds: int = option("--folds N", "Folds of one-shot-5fold, where 5 are too many.", 5)

    @property
    def title(self) -> str:
        """Which pairs are run."""
        return f"{self.protocol}, one of {self.every}" if self.every > 1 else self.protocol

    def pairs(self, cases: Sequence[str], seed: int) -> tuple[Pair, ...]:
        """Make the pairs of the protocol."""
        from ..benchmark import make_pairs

        atlases = split_list(self.atlas, "--atlas")
        return make_pairs(cases, self.protocol, seed=seed, folds=self.folds, atlases=atlases, every=self.every)


@options
class ProtocolOptions(PairOptions):
    """Options of ``benchmark protocol``."""

    models: str | None = option("--models A,B,A+B,...", "Models to compare, several as one with + [default: builtin].")
    engines: str | None = option("--engines A,B,...", "Registration engines to compare.")
    variants: list[str] | None = option(
        "--variant NAME:KEY=VALUE[;KEY=VALUE...]", "Also compare with these settings; may be repeated."
    )


@command(app, "protocol")
def protocol(options: ProtocolOptions) -> None:
    """Atlas only, model, fused and oracle over the pairs of a protocol (what `benchmark DATASET` runs)."""

    def columns(base: Variant, _notes: list[str]) -> list[Variant]:
        made = [base]
        if options.models is not None:
            made = _with_models(base, split_list(options.models, "--models"))
        if options.engines is not None:
            names = split_list(options.engines, "--engines")
            made = [_with(one, engine, registration={"engine": engine}) for one in made for engine in names]
        made += [_parsed(text, base) for text in options.variants or ()]
        return [replace(one, name=one.name or "default") for one in made]

    _run(options.title, columns, options)


@options
class ModelBenchmarkOptions(PairOptions):
    """Options of comparisons of one model."""

    model: str | None = option("--model NAME[,NAME]", "Segmentation model, or several [default: builtin].")


@command(app, "ablation")
def ablation(options: ModelBenchmarkOptions) -> None:
    """The paper's Table 4: stages of the registration off and on; the model alone, with prompts, with fusion.

    "user click" is the model alone: a simulated user, who sees the structure, clicks once into its middle. It is left
    out for a model that takes no click.
    """

    def columns(base: Variant, notes: list[str]) -> list[Variant]:
        from ..models.table import describe_models, shared_prompts
        from ..settings import NO_MODEL

        model = base.settings.model
        if model == NO_MODEL:
            raise InputError("an ablation needs a model; leave out --model none")
        stages = ("rigid", "affine", "deformable")
        made = [
            _with(base, name, model=NO_MODEL, registration={stage: stage in name.split(", ") for stage in stages})
            for name in ("deformable", "rigid", "rigid, deformable", "rigid, affine")
        ]
        # A simulated user prompts one model.
        if "," not in model and "click" in shared_prompts(describe_models(base.settings)):
            made.append(replace(base, name="user click", prompts_from="user"))
        else:
            notes.append(f"left out: user click, which the model {model!r} does not take")
        return [*made, _with(base, "all stages", registration=dict.fromkeys(stages, True))]

    _run(f"ablation, {options.title}", columns, options)


@options
class PromptsOptions(PairOptions):
    """Options of ``benchmark prompts``."""

    models: str = option("--models A,B,A+B,...", "Models, each with all the prompts it takes.", "builtin")


@command(app, "prompts")
def prompts(options: PromptsOptions) -> None:
    """The paper's Table 6: click, box and mask from the warped atlas, for each model that takes them.

    A model that takes no prompt has one column, "region".
    """

    def columns(base: Variant, _notes: list[str]) -> list[Variant]:
        from ..models.table import describe_models, shared_prompts
        from ..settings import NO_MODEL

        models = split_list(options.models, "--models")
        if NO_MODEL in models:
            raise InputError(f"--models {options.models}: {NO_MODEL!r} takes no prompt; leave it out")
        # "region" is no prompt that can be asked for: a model that takes it takes no other.
        return [
            _with(one, kind, prompt="auto" if kind == "region" else kind)
            for one in _with_models(replace(base, methods=("model", "fused")), models)
            for kind in ("click", "box", "mask", "region")
            if kind in shared_prompts(describe_models(one.settings))
        ]

    _run(f"prompts, {options.title}", columns, options)


@options
class EnginesOptions(ModelBenchmarkOptions):
    """Options of ``benchmark engines``."""

    engines: str | None = option(
        "--engines A,B,...",
        "Registration engines [default: all that are installed; voxelmorph, which takes minutes a pair on a CPU, only "
        "with a GPU].",
    )


@command(app, "engines")
def engines(options: EnginesOptions) -> None:
    """The paper's Table 7: registration engines, alternating on the same pairs so that their times compare."""

    def columns(base: Variant, notes: list[str]) -> list[Variant]:
        names = split_list(options.engines, "--engines") or _usable_engines(base, options.device, notes)
        base = replace(base, methods=("atlas", "fused"))
        return [_with(base, engine, registration={"engine": engine}) for engine in names]

    _run(f"engines, {options.title}", columns, options)


@options
class IclOptions(ModelBenchmarkOptions):
    """Options of ``benchmark icl``."""

    baselines: str | None = option("--baselines A,B,...", "Baselines to compare with [default: all].")
    support: int | None = option("--support N", "Slices of the atlas for a slice [default: the baseline's].", min=1)
    random_weights: bool = flag(
        "--random-weights", "Run the baselines with random weights: what they cost, not how good they are."
    )


@command(app, "icl")
def icl(options: IclOptions) -> None:
    """The paper's Tables 1 to 3 and 5: in-context baselines on the same pairs, with time, memory and parameters.

    universeg, tyche and seggpt segment a scan from slices of the atlas, without registration. Their weights are fetched
    by `models fetch NAME`, or named as --model-path NAME=PATH,NAME=PATH.
    """
    from ..models import BASELINES
    from ..models.incontext import Baseline, describe_baseline

    with options.session():
        names = split_list(options.baselines, "--baselines") or tuple(BASELINES)
        for name in names:
            describe_baseline(name)
        paths, others = _baseline_paths(options.model_path, names)
        if paths and options.random_weights:
            raise InputError(f"--model-path names weights of {', '.join(paths)}, and --random-weights asks for none")
    made = [Baseline(name, paths.get(name), options.random_weights, options.support) for name in names]

    def columns(base: Variant, _notes: list[str]) -> list[Variant]:
        own = replace(base, name="AtlasSegFM", methods=("atlas", "fused"))
        return [own, *(replace(base, name=one.title, baseline=one) for one in made)]

    options = replace(options, model_path=others)  # type: ignore[type-var]  # a dataclass by `options`
    _run(f"in-context baselines, {options.title}", columns, options)


@options
class AtlasesOptions(DatasetOptions):
    """Options of ``benchmark atlases``."""

    counts: str = option("--counts N,N,...", "Numbers of atlases, drawn at random for each query.", "1,2,3,5")
    selected: int | None = option("--selected N", "Also the N of the largest number that are most alike.", min=1)
    draws: int = option("--draws N", "Sets of atlases for each query.", 1, min=1)
    model: str | None = option("--model NAME[,NAME]", "Segmentation model, or several [default: builtin].")

    @property
    def numbers(self) -> list[int]:
        """The counts, ascending."""
        texts = split_list(self.counts, "--counts")
        if not all(text.isdecimal() and int(text) for text in texts):
            raise InputError(f"--counts {self.counts}: expected whole numbers of at least 1 with commas between")
        return sorted({int(text) for text in texts})

    def pairs(self, cases: Sequence[str], seed: int) -> tuple[Pair, ...]:
        """Draw the sets of atlases."""
        from ..benchmark import draw_sets

        return draw_sets(cases, self.numbers[-1], self.draws, seed=seed)


@command(app, "atlases")
def atlases(options: AtlasesOptions) -> None:
    """Dice and seconds against the number of atlases: drawn at random, and those most alike of more.

    Sets of one query and draw contain each other.
    """

    def columns(base: Variant, _notes: list[str]) -> list[Variant]:
        numbers, most = options.numbers, options.numbers[-1]
        base = _with(base, "", most_atlases=most)
        made = [replace(base, name=counted(number, "atlas", "atlases"), atlases=number) for number in numbers]
        if options.selected is None:
            return made
        if options.selected >= most:
            raise InputError(f"--selected {options.selected}: expected fewer than the largest of --counts ({most})")
        return [*made, _with(base, f"{options.selected} of {most}", most_atlases=options.selected)]

    _run(f"sets of atlases, {counted(options.draws, 'draw')} a query", columns, options)


@options
class VesselsOptions(BenchmarkOptions):
    """Options of ``benchmark vessels``."""

    seeds: str = option("--seeds N,N,...", "Trees, by their seeds.", "4,5,6,7,8,9")
    subjects: int = option("--subjects N", "Subjects with each tree, of which all pairs are run.", 2, min=2)
    model: str | None = option("--model NAME[,NAME]", "Segmentation model, or several [default: builtin].")
    as_organs: bool = flag("--as-organs", "Do not mark the vessels as tubular, to see what that is worth.")
    #: What other comparisons ask for is known of made scans.
    cases: ClassVar[str | None] = None
    labels: ClassVar[str | None] = None
    cldice: ClassVar[str | None] = "*"
    channel: ClassVar[int] = 0

    @property
    def dataset(self) -> Path:
        """Folder of the made scans."""
        from ..benchmark.plan import TREES

        return self.out / TREES

    def pairs(self, _cases: Sequence[str], _seed: int) -> tuple[Pair, ...]:
        """Make all pairs of subjects with one tree."""
        from ..benchmark.vessels import tree_pairs

        return tree_pairs(_seeds(self.seeds), self.subjects)


@command(app, "vessels")
def vessels(options: VesselsOptions) -> None:
    """Made vascular trees, as CT angiography shows them: the whole method on thin structures, in clDice, Dice and HD95.

    Subjects with one tree have the same branches and nothing else. Settings were chosen on the seeds 0 to 3.
    """

    def columns(base: Variant, _notes: list[str]) -> list[Variant]:
        from ..benchmark.plan import OUTPUTS
        from ..benchmark.vessels import VESSELS, write_trees
        from ..core.files import check_replaceable

        check_replaceable(options.out, OUTPUTS)
        write_trees(options.dataset, _seeds(options.seeds), options.subjects, again=options.force)
        return [_with(base, "default", tubular="" if options.as_organs else VESSELS.name)]

    _run(f"made vessels, seeds {options.seeds}", columns, options)


@options
class TimeOptions(ScreenOptions, DeviceOptions, ModelOptions):
    """Options of ``benchmark time``."""

    dataset: Path | None = argument(
        "[DATASET]", "Folder whose first two cases are used [default: the embedded pair].", None
    )
    labels: str | None = labels_option()
    rounds: int = option("--rounds N", "Number of runs, of which the median counts.", 3, min=1)
    shape: str = option("--shape IxJxK", "Voxels of both scans.", "256x256x240")


@command(app, "time")
def time(options: TimeOptions) -> None:
    """The paper's Table 5: seconds and parameters of each stage on scans of 256 x 256 x 240 voxels."""
    with options.session() as session:
        from ..benchmark.timing import measure, scans_for
        from ..core.device import resolve_device

        base = options.settings()
        size, wanted = _shape(options.shape), split_list(options.labels, "--labels")
        if wanted and options.dataset is None:
            raise InputError("--labels belongs to a dataset; the embedded scans are used as they are")
        options.accept(base, session)
        session.progress("making the scans")
        atlas, query = scans_for(options.dataset, size, wanted)
        device = resolve_device(options.device)
        timing = measure(atlas, query, base, device=device, rounds=options.rounds, on_stage=session.progress)
    if options.as_json:
        print_json(asdict(timing))
        return
    sizes = " x ".join(str(n) for n in query.grid.shape)
    source = "embedded scans" if options.dataset is None else options.dataset.name
    typer.echo(f"{sizes} voxels ({source}), {counted(len(atlas.structures), 'structure')}, {timing.device}")
    typer.echo(f"median of {counted(options.rounds, 'run')}; peak {timing.peak_memory_mb} MB")
    rows = [
        (one.name, f"{one.seconds:.2f}", "" if one.parameters is None else str(one.parameters)) for one in timing.stages
    ]
    print_table(("stage", "seconds", "parameters"), rows, numbers_from=1)


def _usable_engines(base: Variant, device: str, notes: list[str]) -> list[str]:
    """The engines to compare where none is named; those left out are noted, with the reason."""
    from ..core.device import resolve_device
    from ..registration import ENGINES, require_engine

    names = []
    for name in ENGINES:
        if name == "voxelmorph" and resolve_device(device) == "cpu":
            notes.append("left out: voxelmorph takes minutes a pair on a CPU; name it with --engines to have it")
            continue
        try:
            require_engine(_with(base, name, registration={"engine": name}).settings.registration)
        except MissingExtraError as error:
            notes.append(f"left out: {error}")
        else:
            names.append(name)
    return names


def _run(
    title: str,
    columns: Callable[[Variant, list[str]], list[Variant]],
    options: DatasetOptions | VesselsOptions,
) -> None:
    """Run a benchmark and print its table; ``columns`` makes the variants of a plain one, and may add to the notes."""
    with options.session() as session:
        if options.plots:
            require_pictures("--no-plots")
        from ..benchmark import Variant, run, write_reports
        from ..benchmark.tables import columns_of, main_table

        notes: list[str] = []
        plan = _plan(title, columns(Variant("", options.settings()), notes), options)
        if options.accept_licence:
            accept_licences([name for one in plan.variants for name in one.weighted], session)
        dataset, cases = plan.dataset, [case.name for case in plan.dataset.cases]
        pairs, of = counted(len(plan.pairs), "pair"), counted(len(cases), "case")
        session.note(f"{dataset.name}: {pairs} of {of}: {', '.join(cases)}")
        session.note(f"structures: {', '.join(f'{name} ({value})' for value, name in plan.names.items())}")
        if left := [name for value, name in dataset.structures.items() if value not in plan.values]:
            session.say(f"left out on request: {', '.join(left)}")
        for note in notes:
            session.note(note)

        records = run(
            plan,
            options.out,
            force=options.force,
            on_planned=lambda kept, to_do: session.note(f"{kept} kept, {to_do} to do") if kept else None,
            on_pair=session.begin_pair,
            on_stage=session.progress,
        )
        session.progress("tables")
        summary = write_reports(plan, records, options.out, plots=options.plots)
    if options.as_json:
        print_json(summary)
    else:
        head, *rows = main_table(columns_of(plan, records))
        print_table(head, rows, numbers_from=len(head) - 5)
        typer.echo(f"\nreport    {options.out / 'report.md'}")
    if any(record.failure for record in records):
        raise typer.Exit(EXIT_FAILURES)


def _plan(title: str, variants: Sequence[Variant], options: DatasetOptions | VesselsOptions) -> Plan:
    """Plan the run, checked as far as possible without opening a scan."""
    from ..benchmark import Plan
    from ..core.dataset import load_dataset, pick_structures
    from ..core.device import resolve_device
    from ..models.table import prompt_kind
    from ..registration import require_engine

    names = [one.name for one in variants]
    if len(set(names)) < len(names):
        raise InputError(f"two variants have the same name ({', '.join(names)}); name each once")
    for one in variants:
        prompt_kind(one.settings)
        require_engine(one.settings.registration)
    seed = variants[0].settings.seed
    tolerances = read_tolerance(options.tolerance)
    dataset = load_dataset(options.dataset, channel=options.channel)
    if options.cases is not None:
        dataset = dataset.select(split_list(options.cases, "--cases"))
    values = pick_structures(dataset, split_list(options.labels, "--labels") or ["*"])
    centreline = split_list(options.cldice, "--cldice")
    thin = pick_structures(dataset, centreline) if centreline else ()
    if not set(thin) <= set(values):
        raise InputError(f"--cldice {options.cldice}: is not among the structures of --labels {options.labels}; add it")
    pairs = options.pairs([case.name for case in dataset.cases], seed)
    device, again = resolve_device(options.device), shlex.join(["atlassegfm", *sys.argv[1:]])
    return Plan(title, dataset, pairs, tuple(variants), values, tolerances, thin, seed, device, again)


def _with(variant: Variant, name: str, **table: Any) -> Variant:
    """A variant with other settings and a longer name."""
    from ..core.config import with_table

    settings: Settings = with_table(variant.settings, table, origin=name)
    return replace(variant, name=f"{variant.name} {name}".strip(), settings=settings)


def _with_models(variant: Variant, models: Sequence[str]) -> list[Variant]:
    """A variant for each model, or several with + between them; paths of weights go with those that have any."""
    from ..models.table import describe_models, weights_paths
    from ..settings import NO_MODEL

    made = [_with(variant, name, model=name.replace("+", ",")) for name in models]
    named = {model for one in made for model in one.settings.model_names}
    paths = weights_paths(_with(variant, "", model=",".join(named) or NO_MODEL).settings)
    for n, one in enumerate(made):
        rows = [row for row in describe_models(one.settings) if row.weights is not None and row.name in paths]
        text = ",".join(f"{row.name}={paths[row.name]}" for row in rows)
        made[n] = replace(one, settings=replace(one.settings, model_path=text))
    return made


def _baseline_paths(given: Path | None, names: Sequence[str]) -> tuple[dict[str, Path], Path | None]:
    """Part the paths of weights into those of baselines and those of models."""
    from ..models import BASELINES

    parts = [] if given is None else str(given).split(",")
    paths = {name: Path(path).expanduser() for name, sign, path in (part.partition("=") for part in parts) if sign}
    of_baselines = {name: path for name, path in paths.items() if name in BASELINES}
    if unused := [name for name in of_baselines if name not in names]:
        raise InputError(f"--model-path names weights of {', '.join(unused)}, not among --baselines {','.join(names)}")
    others = [part for part in parts if part.partition("=")[0] not in of_baselines]
    return of_baselines, Path(",".join(others)) if others else None


def _parsed(text: str, base: Variant) -> Variant:
    """``NAME:KEY=VALUE;KEY=VALUE`` as a variant."""
    from ..core.config import with_overrides

    name, colon, rest = text.partition(":")
    assignments = [part.strip() for part in rest.split(";") if part.strip()]
    if not colon or not name.strip() or not assignments:
        raise InputError(f"--variant {text}: expected NAME:KEY=VALUE, with semicolons between several")
    settings = with_overrides(base.settings, assignments, option=f"--variant {name}:")
    return replace(base, name=name.strip(), settings=settings)


def _seeds(text: str) -> list[int]:
    parts = split_list(text, "--seeds")
    if not parts or not all(part.isdecimal() for part in parts):
        raise InputError(f"--seeds {text}: expected whole numbers from 0 on with commas between, as 4,5,6")
    return sorted({int(part) for part in parts})


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= 8 for part in parts):
        raise InputError(f"--shape {text}: expected three numbers of voxels of at least 8, as 256x256x240")
    i, j, k = (int(part) for part in parts)
    return i, j, k
