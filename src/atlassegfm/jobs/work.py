"""The work on one case: read, segment, write; and what is loaded once for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..context import Context, customize
from ..core.config import to_toml
from ..core.errors import AtlasSegError, InputError, ModelError
from ..core.files import DiskFullError
from ..core.image import Volume
from ..core.parallel import limited_threads, peak_memory_mb, reset_peak_memory, thread_variables
from ..core.version import __version__
from ..dicom import Selection, open_image
from ..fusion.gate import Gate
from ..models.base import Models
from ..models.table import describe_models, load_chosen, weights_paths, with_weights_paths
from ..models.weights import find_weights
from ..quality.verdict import LEAST_CONFIDENCE, SWAPPED, describe_confidence
from ..records import FileRecord, Provenance, RunRecord, State, StatusRecord, StructureRecord
from ..result import Segmentation, StructureResult
from ..segment import segment
from ..settings import Settings
from ..transforms.io import read_transforms
from .fingerprint import context_digest, digest, file_record
from .plan import Case
from .store import RunInputs, check_formats, write_failure, write_result

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Progress of a run."""

    def begun(self, case: Case) -> None:
        """Show that a case begins."""

    def stage(self, case: Case, stage: str) -> None:
        """Show that a stage of a case begins."""


@dataclass(frozen=True)
class Row:
    """Outcome of one case."""

    case: Case
    state: State  # "left": not begun, or not finished, when the run was stopped
    reason: str = ""  # why it failed, in a sentence that begins with the file's name
    is_input: bool = False  # whether the query itself is to blame for that
    attempts: int = 1
    seconds: float = 0.0  # wall time of the computation
    peak_memory_mb: int | None = None  # of the process that computed it
    warnings: tuple[str, ...] = ()  # on the result as a whole
    disk_full: bool = False  # whether the next case would fail for the same reason
    kept: bool = False  # whether an earlier run had done it
    why: str = ""  # why it was computed: "new", "failed before", "other settings" and so on; empty where it was kept


#: Segments a case: takes the case, the number of the attempt and a callback for stages. A failure is a result.
Task = Callable[[Case, int, Callable[[str], None]], Row]


@dataclass(frozen=True)
class Output:
    """Files to write of each result, and series to read of each query."""

    keep: bool = False  # whether to write intermediate results
    formats: tuple[str, ...] = ("nifti",)  # of records.FORMATS
    series: str | None = None  # which series of a query that is a DICOM folder; None where there is one


@dataclass(frozen=True)
class AtlasFiles:
    """An annotated scan in files; see :meth:`~atlassegfm.atlas.Atlas.from_files`."""

    atlas: Path
    labels: Path
    names: Path | None = None
    series: str | None = None
    selection: Selection = field(default_factory=Selection)

    def load(self, settings: Settings) -> Context:
        """Read it; its gate is trained with the first case."""
        return Context.from_files(
            self.atlas, self.labels, self.names, settings=settings, series=self.series, selection=self.selection
        )

    def absolute(self) -> AtlasFiles:
        """Copy with absolute paths."""
        names = None if self.names is None else self.names.absolute()
        return replace(self, atlas=self.atlas.absolute(), labels=self.labels.absolute(), names=names)


@dataclass(frozen=True)
class ContextFolder:
    """A folder that ``atlassegfm customize`` wrote."""

    folder: Path

    def load(self, settings: Settings) -> Context:
        """Read it, and check that the settings fit its gate."""
        context = Context.load(self.folder)
        context.check_settings(settings)
        return context

    def absolute(self) -> ContextFolder:
        """Copy with absolute paths."""
        return ContextFolder(self.folder.absolute())


ContextSource = AtlasFiles | ContextFolder


@dataclass(frozen=True)
class SegmentWork:
    """Segmentation of every case with one context; goes to other processes and machines."""

    out: Path  # folder of the result folders; exists
    source: ContextSource
    settings: Settings
    device: str  # "auto", "cpu" or "cuda"
    threads: int | None  # threads of a case; None takes all cores
    output: Output
    provenance: Provenance  # as provenance_of gives it
    gate: Gate | None = None  # trained already, for a context that has none

    @property
    def key(self) -> str:
        """Digest of all of it: what was opened once serves all cases of equal work."""
        return digest(str(self.out), self.provenance.to_json())

    @property
    def environment(self) -> Mapping[str, str]:
        """Number of threads, for libraries that read it when they are loaded."""
        # Threads that spin while they wait slow down all others on the same cores.
        threads = {} if self.threads is None else thread_variables(self.threads)
        return {**threads, "OMP_WAIT_POLICY": "PASSIVE"}

    def absolute(self) -> SegmentWork:
        """Copy with absolute paths."""
        settings = with_weights_paths(self.settings, Path.absolute)
        return replace(self, out=self.out.absolute(), source=self.source.absolute(), settings=settings)

    def open(self, context: Context | None = None) -> Worker:
        """Load the context, unless it is given, and the model."""
        if __version__ != self.provenance.version:
            raise ModelError(
                f"this worker has atlassegfm {__version__} and the run was begun by {self.provenance.version}; install "
                "the same version everywhere"
            )
        with limited_threads(self.threads):
            context = context or self.source.load(self.settings)
            if context.gate is None and self.gate is not None:
                context = replace(context, settings=self.settings, gate=self.gate)
            model = load_chosen(self.settings, self.device)
            context.check_model(model)
        return Worker(self, context, model)

    def with_gate(self, context: Context, on_stage: Callable[[str], None]) -> SegmentWork:
        """Train the gate of a context that has none, so that it is trained once for all workers."""
        if context.gate is not None or not self.settings.model_names:
            return self
        with limited_threads(self.threads):
            context = replace(context, settings=self.settings)
            return replace(self, gate=customize(context, device=self.device, on_stage=on_stage).gate)

    def give_up(self, case: Case, reason: str, attempts: int, *, is_input: bool = False, seconds: float = 0.0) -> Row:
        """Record in the case's folder that it cannot be done."""
        reason, peak = redact(case, reason.replace(str(self.out / case.name), case.name)), peak_memory_mb()
        failure: dict[str, Any] = {"reason": reason, "is_input": is_input, "attempts": attempts, "peak_memory_mb": peak}
        try:
            status = StatusRecord(state="failed", total_seconds=round(seconds, 3), **failure)
            write_failure(self.out / case.name, status)
        except InputError as error:
            logger.warning("%s", error)
        return Row(case, "failed", seconds=seconds, **failure)


_opened: dict[str, Task] = {}


def opened(work: SegmentWork) -> Task:
    """Open work, once for all its cases in this process."""
    if work.key not in _opened:
        _opened.clear()
        _opened[work.key] = work.open()
    return _opened[work.key]


@dataclass
class Worker:
    """Context and model, loaded once for all cases of a process; a :data:`Task`."""

    work: SegmentWork
    context: Context
    model: Models | None

    def __call__(self, case: Case, attempt: int, on_stage: Callable[[str], None]) -> Row:
        """Read, segment and write one case; on an error, an earlier result is replaced by the reason."""
        work, start, is_input, disk_full = self.work, time.perf_counter(), False, False
        reset_peak_memory()
        try:
            with limited_threads(work.threads):
                return self.do(case, attempt, on_stage)
        except AtlasSegError as error:
            disk_full = isinstance(error, DiskFullError)
            reason, is_input = str(error), isinstance(error, InputError) and not disk_full
        except Exception as error:
            # A defect of this program: one scan that meets it must not cost the results of all others.
            logger.exception("%s: unexpected error", case.query)
            reason = f"unexpected error ({error!r})"
        ended = work.give_up(case, reason, attempt, is_input=is_input, seconds=time.perf_counter() - start)
        return replace(ended, disk_full=disk_full)

    def read(self, case: Case) -> Volume:
        """Read the query of a case."""
        return open_image(case.query, self.work.output.series if case.query.is_dir() else None)

    def do(self, case: Case, attempt: int, on_stage: Callable[[str], None]) -> Row:
        """Segment a query and write its result folder."""
        work = self.work
        on_stage("reading")
        files = {"query": _record(case.query), "transform": None if case.transform is None else _record(case.transform)}
        query = self.read(case)
        transforms = () if case.transform is None else read_transforms(case.transform)
        check_formats(work.output.formats, query)
        result = segment(
            self.context,
            query,
            work.settings,
            device=work.device,
            model=self.model,
            transforms=transforms,
            on_stage=on_stage,
        )
        inputs = RunInputs(self.context, query, case.transform)
        if result.gate is not None:
            self.context = replace(self.context, settings=work.settings, gate=result.gate)
        on_stage("writing")
        status = StatusRecord(
            state="done",
            attempts=attempt,
            warnings=tuple(warnings_on(result)),
            total_seconds=round(sum(result.seconds.values()), 3),
            peak_memory_mb=peak_memory_mb(),
            seconds={name: round(seconds, 3) for name, seconds in result.seconds.items()},
            registration_seconds={name: round(n, 3) for name, n in result.registration.seconds.items()},
            provenance=work.provenance.model_copy(update=files),
        )
        write_result(result, inputs, work.out / case.name, status, keep=work.output.keep, formats=work.output.formats)
        seconds, peak, warnings = status.total_seconds, status.peak_memory_mb, status.warnings
        return Row(case, "done", attempts=attempt, seconds=seconds, peak_memory_mb=peak, warnings=warnings)


def provenance_of(
    context: Context, settings: Settings, *, device: str, threads: int | None, output: Output
) -> Provenance:
    """Describe what results depend on besides the files of a case; arguments as in :class:`SegmentWork`."""
    # The path of the weights is no setting of the method; their content is looked at.
    return Provenance(
        version=__version__,
        settings=digest(to_toml(replace(settings, model_path="")), device, str(threads)),
        context=context_digest(context),
        context_version=context.version,
        weights=_weights(settings),
        keep=output.keep,
        formats=tuple(sorted(output.formats)),
        series=output.series,
    )


def warnings_on(result: Segmentation | RunRecord) -> list[str]:
    """List the warnings on a result as a whole, the wrong part of the body above all."""
    found = []
    confidence = result.registration.confidence
    # NaN and None, where it was not measured, are not.
    if result.is_judged and confidence is not None and confidence < LEAST_CONFIDENCE:
        found.append(f"{describe_confidence(confidence)}; is it the same part of the body?")
    if result.swapped:
        found.append(f"{SWAPPED}; compare with the original or a known side, such as liver or heart")
    if not any(one.status == "present" for one in result.structures):
        found.append("no structure of the atlas was found")
    # What is out of view is never failed, and says nothing on what is in it.
    structures: Sequence[StructureResult | StructureRecord] = result.structures
    judged = [one.quality for one in structures if one.quality is not None and one.status != "outside"]
    if not found and judged and all(one.verdict == "failed" for one in judged):
        found.append(
            f"every structure in view is judged failed ({len(judged)} of {len(judged)}); "
            "is it the same part of the body as the atlas?"
        )
    return found


def redact(case: Case, reason: str) -> str:
    """Begin a reason with the name of the case's file, without folders: paths in clinics name patients."""
    for path in {str(case.query), str(case.query.absolute())}:
        reason = reason.replace(path, case.query.name)
    return reason if reason.startswith(case.query.name) else f"{case.query.name}: {reason}"


def _record(path: Path) -> FileRecord | None:
    try:
        return file_record(path)
    except OSError:
        return None  # reading it next says what is wrong


def _weights(settings: Settings) -> str | None:
    """SHA-256 of the models' weights, with commas between them; None where there are none on this machine."""
    try:
        paths, rows = weights_paths(settings), describe_models(settings)
        found = [find_weights(row.name, row.weights, paths.get(row.name)) for row in rows if row.weights is not None]
        sums = [file_record(path).sha256 for path in found]
    except (AtlasSegError, OSError):
        return None  # they may be on a server; if not, loading the model says what is wrong
    return ",".join(filter(None, sums)) or None
