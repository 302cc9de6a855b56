"""Second pass of a run: structures that the first did not find well are tried again with another case as the atlas.

A case of the same cohort in which the structures are good, and whose scan is alike, lies nearer than the atlas: a
stepping stone. Each case is tried once. Plan and decisions use values of the first pass only, so that an interrupted
run continues to the same files; a case that is tried serves no other one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ..atlas import Atlas
from ..context import Context
from ..core.errors import InputError
from ..core.image import Volume
from ..core.labels import listed
from ..dicom import contours_in
from ..quality.verdict import LEAST_CONFIDENCE, Verdict, is_calibrated, overall
from ..records import FORMATS, RUN, STATUS, MendedRecord, RunRecord, SecondPassRecord, StatusRecord, StructureRecord
from ..report.distribution import outliers
from ..result import Segmentation
from ..segment import segment
from .fingerprint import digest
from .plan import Case
from .store import LabelledQuery, read_labels, rewrite_result, structure_record
from .table import read_run
from .work import Row, SegmentWork, Worker, redact, warnings_on

logger = logging.getLogger(__name__)

#: Fewest results of a cohort that help each other, and the largest fraction of them that is tried again.
FEWEST_CASES, MOST_TRIED = 5, 0.25
#: The estimated Dice of a structure that is taken over is higher by at least this.
LEAST_GAIN = 0.05
#: Largest fraction of a structure that is taken over which lies on good structures; it stays theirs.
MOST_SHARED = 0.2


@dataclass(frozen=True)
class Try:
    """A case that is tried again, and the case that serves as its atlas."""

    case: Case
    donor: Case
    wanted: tuple[int, ...]  # label values to mend


class First(NamedTuple):
    """What the first pass found of a structure."""

    status: str
    verdict: Verdict | None
    estimate: float  # Dice; 0 where there is none
    volume_ml: float
    is_cut: bool

    @classmethod
    def of(cls, one: StructureRecord) -> First:
        """Read it from a record, mended or not."""
        if (before := one.mended) is not None:
            return cls(before.status, before.verdict, before.estimated_dice or 0.0, before.volume_ml, bool(one.cut))
        verdict, estimate = (None, None) if one.quality is None else (one.quality.verdict, one.quality.estimated_dice)
        return cls(one.status, verdict, estimate or 0.0, one.volume_ml, bool(one.cut))

    @property
    def is_good(self) -> bool:
        """Whether it can serve another case, and stays as it is."""
        return self.status == "present" and self.verdict == "good"

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be mended."""
        return self.status != "outside" and self.verdict in ("review", "failed")


def plan_second_pass(cases: Sequence[Case], work: SegmentWork) -> list[Try]:
    """Choose the cases to try again, those with the lowest estimates first, and the case that helps each.

    ``cases`` are those with a result. Whether one was tried or mended already does not matter here.
    """
    if len(cases) < FEWEST_CASES or not is_calibrated(work.settings, transform_given=False):
        return []
    read = ((case, read_run(work.out / case.name)) for case in cases if case.transform is None)
    runs = {case.name: (case, run) for case, run in sorted(read, key=lambda one: one[0].name) if run is not None}
    first = {name: {one.value: First.of(one) for one in run.structures} for name, (_, run) in runs.items()}
    poor = {name: [one.estimate for one in found.values() if one.is_wanted] for name, found in first.items()}

    def hope(name: str) -> tuple[bool, float, str]:
        """Scans that hardly resemble the atlas come last."""
        confidence = runs[name][1].registration.confidence
        return confidence is not None and confidence < LEAST_CONFIDENCE, min(poor[name]), name

    chosen = sorted((name for name in runs if poor[name]), key=hope)[: int(MOST_TRIED * len(cases))]
    tries = []
    for name in chosen:
        case, run = runs[name]
        wanted = {value for value, one in first[name].items() if one.is_wanted}
        ranked = []
        for other in runs.keys() - set(chosen):
            usable = {value for value in wanted if value in first[other] and first[other][value].is_good}
            if usable:
                estimate = sum(first[other][value].estimate for value in usable) / len(usable)
                far = _distance(first[name], first[other]) + _distance_of_sizes(run, runs[other][1])
                ranked.append((-len(usable), round(far + 1 - estimate, 6), other, usable))
        if ranked:
            *_, other, usable = min(ranked)
            tries.append(Try(case, runs[other][0], tuple(sorted(usable))))
    return tries


def _distance(one: Mapping[int, First], other: Mapping[int, First]) -> float:
    """Mean difference of log volumes of structures good in both; 1 where there are none."""
    both = [(one[value], other[value]) for value in one.keys() & other.keys()]
    whole = [pair for pair in both if all(found.is_good and not found.is_cut and found.volume_ml for found in pair)]
    logs = [abs(math.log(a.volume_ml / b.volume_ml)) for a, b in whole]
    return math.fsum(logs) / len(logs) if logs else 1.0


def _distance_of_sizes(one: RunRecord, other: RunRecord) -> float:
    """Mean difference of the log scales of both linear registrations to the atlas."""
    matrices = np.array([run.registration.linear_query_to_atlas_mm for run in (one, other)])[:, :3, :3]
    scales = np.log(np.linalg.svd(matrices, compute_uv=False))
    return float(np.abs(scales[0] - scales[1]).mean())


def good_volumes(cases: Sequence[Case], work: SegmentWork) -> dict[int, tuple[float, ...]]:
    """Collect the volumes, ml, of each structure where it is good and whole."""
    found: dict[int, list[float]] = {}
    for run in (read_run(work.out / case.name) for case in cases):
        for one in () if run is None else run.structures:
            first = First.of(one)
            if first.is_good and not first.is_cut and first.volume_ml:
                found.setdefault(one.value, []).append(first.volume_ml)
    return {value: tuple(sorted(volumes)) for value, volumes in found.items()}


@dataclass(frozen=True)
class SecondPass(SegmentWork):
    """Second pass over some cases; goes to other processes and machines as the first does."""

    tries: Mapping[str, Try] = field(default_factory=dict)  # by name of the case
    volumes: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # as good_volumes gives them

    @classmethod
    def after(cls, work: SegmentWork, tries: Sequence[Try], volumes: Mapping[int, tuple[float, ...]]) -> SecondPass:
        """Build it from the work of the first pass."""
        shared: dict[str, Any] = {one.name: getattr(work, one.name) for one in fields(SegmentWork)}
        return cls(**shared, tries={one.case.name: one for one in tries}, volumes=volumes)

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return digest(super().key, repr([(name, one.donor.name) for name, one in sorted(self.tries.items())]))

    def absolute(self) -> SecondPass:
        """Copy with absolute paths."""
        tries = {name: replace(one, donor=one.donor.absolute()) for name, one in self.tries.items()}
        return replace(cast("SecondPass", super().absolute()), tries=tries)

    def open(self, context: Context | None = None) -> Worker:
        """Load context and model."""
        first = super().open(context)
        return _Mender(self, first.context, first.model)

    def give_up(self, case: Case, reason: str, attempts: int, *, is_input: bool = False, seconds: float = 0.0) -> Row:
        """Record that a case could not be tried again; its result stays."""
        del attempts, is_input
        donor = self.tries[case.name].donor.query
        for path in (donor.absolute(), donor):
            reason = reason.replace(str(path), donor.name)
        try:
            return self.record(case, redact(case, reason), seconds)
        except InputError as error:
            logger.warning("%s", error)
            return Row(case, "done", reason)

    def record(self, case: Case, reason: str, seconds: float) -> Row:
        """Record in its status that a case was tried again, and why nothing was taken over."""
        path, donor = self.out / case.name / STATUS, self.tries[case.name].donor.name
        record = SecondPassRecord(donor=donor, reason=reason, seconds=round(seconds, 3))
        status = StatusRecord.read(path).model_copy(update={"second_pass": record})
        status.write(path)
        return Row(case, "done", f"not changed ({reason})", seconds=seconds, warnings=status.warnings)


class _Mender(Worker):
    """Tries cases again, each with its donor as the atlas."""

    work: SecondPass

    def do(self, case: Case, attempt: int, on_stage: Callable[[str], None]) -> Row:
        """Segment a query again, and take over what is better."""
        work, start, tried = self.work, time.perf_counter(), self.work.tries[case.name]
        folder, donor = work.out / case.name, tried.donor
        on_stage("reading")
        run, query = RunRecord.read(folder / RUN), self.read(case)
        context = self._context(donor)
        result = segment(context, query, work.settings, device=work.device, model=self.model, on_stage=on_stage)
        on_stage("writing")
        structures = self.context.atlas.structures
        labels = read_labels(folder, query, structures)
        better, reason = choose(run, result, tried, labels, work.volumes)
        seconds = time.perf_counter() - start
        if not better:
            return work.record(case, reason, seconds)
        labels, changed = merge(run, result, better, labels)
        run = mended_run(run, better, labels, changed, donor.name)
        names = tuple(one.name for one in run.structures if one.value in better)
        second_pass = SecondPassRecord(donor=donor.name, mended=names, seconds=round(seconds, 3))
        status = StatusRecord.read(folder / STATUS).model_copy(
            update={"second_pass": second_pass, "warnings": tuple(warnings_on(run))}
        )
        maps = {value: (result.grid, result.probabilities[value].fused) for value in better}
        contours = {}
        if (rtstruct := folder / FORMATS["rtstruct"]).is_file():
            contours = {value: found for value, found in contours_in(rtstruct).items() if value not in changed}
        written = LabelledQuery(query, labels, structures, run, maps, contours)
        rewrite_result(written, folder, status, work.output.formats)
        text = f"{listed(names)} from {donor.name}"
        return Row(case, "done", text, attempts=attempt, seconds=seconds, warnings=status.warnings)

    def _context(self, donor: Case) -> Context:
        """The scan of a case with its good structures as an atlas, and the gate of the run."""
        folder, scan = self.work.out / donor.name, self.read(donor)
        run, structures = RunRecord.read(folder / RUN), self.context.atlas.structures
        good = [one.value for one in run.structures if First.of(one).is_good]
        labels = read_labels(folder, scan, structures)
        kept = Volume(np.where(np.isin(labels.data, good), labels.data, 0), labels.grid)
        atlas = Atlas.from_volumes(scan, kept, [one for one in structures if one.value in good])
        return Context(atlas, self.work.settings, self.context.gate)


def choose(
    run: RunRecord, result: Segmentation, tried: Try, labels: Volume, volumes: Mapping[int, tuple[float, ...]]
) -> tuple[dict[int, StructureRecord], str]:
    """Choose the structures of a second result that are taken over, by label value; and why none is.

    ``labels`` are those of the first; ``volumes`` as :func:`good_volumes` gives them.
    """
    if not result.registration.confidence >= LEAST_CONFIDENCE:
        return {}, f"confidence of the registration with {tried.donor.name} is {result.registration.confidence:.2f}"
    better, against = {}, []
    first = {one.value: First.of(one) for one in run.structures}
    good = [value for value, one in first.items() if one.is_good]
    for new in map(structure_record, result.structures):
        if new.value not in tried.wanted:
            continue
        found, inside = First.of(new), result.labels.data == new.value
        gain = found.estimate - first[new.value].estimate
        if found.status != "present" or gain < LEAST_GAIN:
            against.append(f"{new.name}: the estimate is no better ({found.estimate:.2f})")
        elif np.isin(labels.data[inside], good).mean() > MOST_SHARED:
            against.append(f"{new.name}: lies on good structures")
        elif not found.is_cut and outliers(np.array([*volumes.get(new.value, ()), found.volume_ml]))[-1]:
            against.append(f"{new.name}: {found.volume_ml:.1f} ml are unlike the volumes of the cohort")
        else:
            better[new.value] = new
    return better, listed(against, 4, "; ")


def merge(
    run: RunRecord, result: Segmentation, better: Mapping[int, StructureRecord], labels: Volume
) -> tuple[Volume, set[int]]:
    """Put structures of a second result into the labels of the first; only failed ones lose voxels to them.

    Gives also the values of all structures that changed.
    """
    kept = [one.value for one in run.structures if First.of(one).verdict != "failed"]
    data = np.where(np.isin(labels.data, [*better]), 0, labels.data).astype(labels.data.dtype)
    taken = np.isin(result.labels.data, [*better]) & ~np.isin(data, kept)
    changed = {*better, *np.unique(data[taken]).tolist()} - {0}
    data[taken] = result.labels.data[taken]
    return Volume(data, labels.grid, labels.source), changed


def mended_run(
    run: RunRecord, better: Mapping[int, StructureRecord], labels: Volume, changed: set[int], donor: str
) -> RunRecord:
    """Describe a result with structures of a second one, from its labels as :func:`merge` gives them."""
    voxels = np.bincount(labels.data.ravel(), minlength=1 + max(one.value for one in run.structures))
    structures = []
    for one in run.structures:
        volume_ml = round(float(voxels[one.value]) * labels.grid.voxel_volume_mm3 / 1000, 4)
        if one.value in better:
            first = First.of(one)
            estimate = None if one.quality is None else one.quality.estimated_dice
            before = MendedRecord(
                donor=donor,
                status=one.status,
                verdict=first.verdict,
                estimated_dice=estimate,
                volume_ml=first.volume_ml,
            )
            one = better[one.value].model_copy(update={"mended": before, "volume_ml": volume_ml})
        elif one.value in changed:
            one = one.model_copy(update={"volume_ml": volume_ml})
            if not volume_ml:
                reason = "all its voxels went to structures of the second pass"
                quality = one.quality and one.quality.model_copy(update={"verdict": "failed", "reason": reason})
                one = one.model_copy(update={"status": "absent", "reason": reason, "quality": quality})
        structures.append(one)
    verdict = overall([one.quality.verdict for one in structures if one.quality is not None])
    return run.model_copy(update={"structures": tuple(structures), "verdict": verdict})
