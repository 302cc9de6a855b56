"""What is done with one case, and what is noted of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..atlas import Atlas
from ..context import Context
from ..core.config import to_dict
from ..core.errors import AtlasSegError, InputError, ModelError
from ..core.parallel import limited_threads, peak_memory_mb, reset_peak_memory, thread_variables
from ..core.version import __version__, source_digest
from ..dicom import Selection, open_image
from ..fusion.gate import Gate
from ..models import MODELS, Segmenter
from ..models.choice import load_chosen
from ..models.weights import find_weights
from ..quality.verdict import LEAST_CONFIDENCE
from ..result import Segmentation
from ..segment import segment
from ..settings import NO_MODEL, Settings
from ..transforms.io import read_fits
from .digests import digest, file_record
from .plan import Case
from .results import RunInputs, check_formats, write_failure, write_result

logger = logging.getLogger(__name__)


#: Version of what ``status.json`` and ``cohort.json`` look like.
FORMAT = 1


#: Code that cannot change a result: results stay valid after a change to it.
_HARMLESS = ("__main__.py", "benchmark/", "cli/", "cohort/", "demo.py", "doctor.py", "evaluation.py", "memory.py")


_HARMLESS_TOO = (
    "metrics/",
    "phantom.py",
    "placement.py",
    "report",
    "statistics.py",
    "suggest.py",
    "threads.py",
    "tolerances/",
)


State = Literal["done", "failed", "left"]


class Watcher(Protocol):
    """Is told how a run goes."""

    def begun(self, case: Case) -> None:
        """A case begins."""

    def stage(self, case: Case, text: str) -> None:
        """A stage of a case begins."""


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Parameters
    ----------
    case : Case
        Which.
    state : {"done", "failed"}
        Whether there is a result.
    reason : str
        Why there is none, in a sentence that begins with the file's name.
    is_input : bool
        Whether the query itself is to blame.
    attempts : int
        How often it was begun.
    seconds : float
        Wall time of the computation.
    peak_memory_mb : int or None
        Of the process that computed it, at its largest meanwhile.
    doubts : tuple of str
        What makes the result doubtful, in words.
    """

    case: Case
    state: State
    reason: str = ""
    is_input: bool = False
    attempts: int = 1
    seconds: float = 0.0
    peak_memory_mb: int | None = None
    doubts: tuple[str, ...] = ()


class Work(Protocol):
    """What is to be done with every case; goes to other processes and machines."""

    @property
    def key(self) -> str:
        """The same for the same work: what was opened once serves all cases."""
        ...

    @property
    def made_with(self) -> Mapping[str, Any]:
        """What results depend on besides the files of a case, as plain values."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables that a process for this work is started with."""
        ...

    def absolute(self) -> Work:
        """The same with paths that hold in any working folder."""
        ...

    def open(self) -> Callable[[Case, int, Callable[[str], None]], Ended]:
        """Load what all cases share; gives a function of a case, the number of the attempt and whom to tell stages."""
        ...

    def give_up(self, case: Case, reason: str, attempts: int) -> Ended:
        """Note that a case cannot be done."""
        ...


@dataclass(frozen=True)
class Output:
    """What is written of each result, and what is read of each query.

    Parameters
    ----------
    keep : bool
        Whether to write the steps between, too.
    formats : tuple of str
        Of :data:`~atlassegfm.jobs.results.FORMATS`.
    series : str or None
        Which series of a query that is a DICOM folder; None where there is one.
    """

    keep: bool = False
    formats: tuple[str, ...] = ("nifti",)
    series: str | None = None


@dataclass(frozen=True, eq=False)
class Annotated:
    """The annotated scan, and what was made of it beforehand.

    Parameters
    ----------
    context : Atlas
        The scan.
    customization : Context or None
        The context folder it comes from, with its gate; None where it comes from files.
    """

    context: Atlas
    customization: Context | None = None


class ContextSource(Protocol):
    """Where the annotated scan comes from."""

    def load(self) -> Annotated:
        """Read it."""
        ...

    def absolute(self) -> ContextSource:
        """The same with paths that hold in any working folder."""
        ...


@dataclass(frozen=True)
class AtlasFiles:
    """The annotated scan in files; see :meth:`~atlassegfm.atlas.Atlas.from_files`."""

    atlas: Path
    labels: Path
    names: Path | None = None
    series: str | None = None
    selection: Selection = field(default_factory=Selection)

    def load(self) -> Annotated:
        """Read it."""
        return Annotated(
            Atlas.from_files(self.atlas, self.labels, self.names, series=self.series, selection=self.selection)
        )

    def absolute(self) -> AtlasFiles:
        """The same with absolute paths."""
        names = None if self.names is None else self.names.absolute()
        return replace(self, atlas=self.atlas.absolute(), labels=self.labels.absolute(), names=names)


@dataclass(frozen=True)
class ContextFolder:
    """The annotated scan in a folder that ``atlassegfm customize`` wrote."""

    folder: Path

    def load(self) -> Annotated:
        """Read it."""
        customization = Context.load(self.folder)
        return Annotated(customization.context, customization)

    def absolute(self) -> ContextFolder:
        """The same with an absolute path."""
        return ContextFolder(self.folder.absolute())


@dataclass(frozen=True)
class SegmentWork:
    """Segment every case by one annotated scan.

    Parameters
    ----------
    out : Path
        Folder of the result folders; exists.
    source : ContextSource
        The annotated scan.
    settings : Settings
        Of the job.
    device : {"auto", "cpu", "cuda"}
        Where to compute.
    threads : int or None
        That a case is computed with; None takes all cores. See :mod:`atlassegfm.core.parallel`.
    output : Output
        What is written.
    made_with : mapping of str to Any
        As :func:`made_with` gives it.
    """

    out: Path
    source: ContextSource
    settings: Settings
    device: str
    threads: int | None
    output: Output
    made_with: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return digest(str(self.out), self.made_with)

    @property
    def environment(self) -> Mapping[str, str]:
        """The number of threads, for libraries that read it when they are loaded."""
        # Threads that spin while they wait slow down all others on the same cores.
        threads = {} if self.threads is None else thread_variables(self.threads)
        return {**threads, "OMP_WAIT_POLICY": "PASSIVE"}

    def absolute(self) -> SegmentWork:
        """The same with absolute paths."""
        path = self.settings.model_path
        settings = replace(self.settings, model_path=str(Path(path).expanduser().absolute())) if path else self.settings
        return replace(self, out=self.out.absolute(), source=self.source.absolute(), settings=settings)

    def load(self) -> LoadedWork:
        """Load the annotated scan and the model."""
        with limited_threads(self.threads):
            annotated, model = self.source.load(), load_chosen(self.settings, self.device)
            if annotated.customization is not None:
                annotated.customization.check_model(model)
            return LoadedWork(self, annotated, model)

    def open(self) -> Callable[[Case, int, Callable[[str], None]], Ended]:
        """Load what all cases share; what the function is given always ends, and never raises for a case's sake."""
        if program() != self.made_with["program"]:
            raise ModelError(
                f"this worker has atlassegfm {program()} and the run was begun by {self.made_with['program']}; install "
                "the same version everywhere"
            )
        loaded = self.load()

        def do(case: Case, attempt: int, tell: Callable[[str], None]) -> Ended:
            start = time.perf_counter()
            is_input = False
            try:
                run = loaded.segment(case, attempt, tell)
            except AtlasSegError as error:
                reason, is_input = str(error), isinstance(error, InputError)
            except Exception as error:
                # A defect of this program: one scan that meets it must not cost the results of all others.
                logger.exception("%s: unexpected error", case.query)
                reason = f"unexpected error ({error!r})"
            else:
                seconds, doubts = run["total_seconds"], tuple(run["doubts"])
                peak = run["peak_memory_mb"]
                return Ended(case, "done", attempts=attempt, seconds=seconds, peak_memory_mb=peak, doubts=doubts)
            return self._failed(case, reason, attempt, is_input=is_input, seconds=time.perf_counter() - start)

        return do

    def give_up(self, case: Case, reason: str, attempts: int) -> Ended:
        """Note in the case's folder that it cannot be done."""
        return self._failed(case, reason, attempts)

    def _failed(self, case: Case, reason: str, attempts: int, *, is_input: bool = False, seconds: float = 0.0) -> Ended:
        reason = told_of(case, reason.replace(str(self.out / case.name), case.name))
        peak = peak_memory_mb()
        status = {
            "state": "failed",
            "reason": reason,
            "format": FORMAT,
            "attempts": attempts,
            "is_input": is_input,
            "total_seconds": round(seconds, 3),
            "peak_memory_mb": peak,
        }
        try:
            write_failure(self.out / case.name, status)
        except InputError as error:
            logger.warning("%s", error)
        return Ended(case, "failed", reason, is_input, attempts, seconds, peak)


@dataclass(frozen=True)
class LoadedWork:
    """What all cases share, loaded.

    Parameters
    ----------
    work : SegmentWork
        What is to be done.
    annotated : Annotated
        The annotated scan.
    model : Segmenter or None
        None where the settings name none.
    gates : list of Gate
        The gate of the first case, where it was trained on the atlas alone and serves all; empty before.
    """

    work: SegmentWork
    annotated: Annotated
    model: Segmenter | None
    gates: list[Gate] = field(default_factory=list)

    def segment(self, case: Case, attempt: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Segment one case and write its result folder.

        Parameters
        ----------
        case : Case
            The query.
        attempt : int
            How often it was begun, with this time.
        tell : callable
            Told the name of each stage as it begins.

        Returns
        -------
        dict
            What was written to ``run.json`` and ``status.json``.

        Raises
        ------
        AtlasSegError
            If there is no result; the folder is as before then.
        """
        work = self.work
        reset_peak_memory()
        with limited_threads(work.threads):
            tell("reading")
            files = {
                "query": _record(case.query),
                "transform": None if case.transform is None else _record(case.transform),
            }
            fits = () if case.transform is None else read_fits(case.transform)
            query = open_image(case.query, work.output.series if case.query.is_dir() else None)
            check_formats(work.output.formats, query)
            customization = self.annotated.customization
            gates = self.gates if customization is None else [customization.gate]
            result = segment(
                self.annotated.context,
                query,
                work.settings,
                device=work.device,
                on_stage=tell,
                model=self.model,
                transform=fits[0] if fits else None,
                further_fits=fits[1:],
                gate=gates[0] if gates else None,
            )
            if result.gate is not None and work.settings.fusion.examples == "simulated" and not self.gates:
                self.gates.append(result.gate)
            tell("writing")
            status = {
                "format": FORMAT,
                "attempts": attempt,
                "doubts": doubts_of(result),
                "made_with": {**work.made_with, **files},
            }
            saved = None if customization is None else customization.summary()
            inputs = RunInputs(self.annotated.context, query, case.transform, saved)
            return write_result(
                result,
                inputs,
                work.out / case.name,
                keep=work.output.keep,
                formats=work.output.formats,
                status=status,
            )


def made_with(
    annotated: Annotated, settings: Settings, *, device: str, threads: int | None, output: Output
) -> dict[str, Any]:
    """What results depend on besides the files of a case: program, settings, context, weights.

    Parameters
    ----------
    annotated : Annotated
        The annotated scan.
    settings, device, threads, output
        As for :class:`SegmentWork`.
    """
    plain = to_dict(settings)
    plain["model_path"] = Path(plain["model_path"]).name
    return {
        "program": program(),
        "settings": digest(plain, device, threads),
        "context": digest(annotated.context),
        "customization": None if annotated.customization is None else annotated.customization.summary(),
        "weights": _weights(settings),
        "keep": output.keep,
        "formats": sorted(output.formats),
        "series": output.series,
    }


def program() -> str:
    """Version of this package and of its code."""
    return f"{__version__}+{source_digest((*_HARMLESS, *_HARMLESS_TOO))}"


def doubts_of(result: Segmentation) -> list[str]:
    """What makes a result doubtful as a whole, in words: the wrong part of the body, above all."""
    found = []
    confidence = result.registration.confidence
    if confidence < LEAST_CONFIDENCE:  # NaN, where a transform was given, is not
        found.append(
            f"the scan hardly resembles the atlas (confidence of the registration {confidence:.2f}); "
            "is it the same part of the body?"
        )
    if not any(one.status == "present" for one in result.structures):
        found.append("no structure of the atlas was found")
    # What is out of view is never failed, and says nothing on what is in it.
    judged = [one.quality for one in result.structures if one.quality is not None and one.status != "outside"]
    if not found and judged and all(one.verdict == "failed" for one in judged):
        found.append(
            f"every structure in view is judged failed ({len(judged)} of {len(judged)}); "
            "is it the same part of the body as the atlas?"
        )
    return found


def told_of(case: Case, reason: str) -> str:
    """A reason that begins with the name of the case's file and says no folder: paths in clinics name patients."""
    for path in {str(case.query), str(case.query.absolute())}:
        reason = reason.replace(path, case.query.name)
    return reason if reason.startswith(case.query.name) else f"{case.query.name}: {reason}"


def _record(path: Path) -> dict[str, str]:
    try:
        return file_record(path)
    except OSError:
        return {}  # reading it next says what is wrong


def _weights(settings: Settings) -> str | None:
    """Digest of the weights of the model; None where it has none on this machine."""
    published = None if settings.model == NO_MODEL else MODELS[settings.model].weights
    if published is None:
        return None
    path = Path(settings.model_path).expanduser() if settings.model_path else None
    try:
        return file_record(find_weights(settings.model, published, path).path)["sha256"]
    except (AtlasSegError, OSError):
        return None  # they may be on a server; if not, loading the model says what is wrong
