"""Second pass of a run: structures that the first did not find well are tried again with another case as the atlas.

A case of the same cohort in which the structures are good, and whose scan is similar, may be nearer than the
atlas. Each case is tried once. Plan and decisions use values of the first pass only, so that an interrupted
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
from numpy.typing import NDArray

from ..atlas import Atlas
from ..context import Context
from ..core.errors import InputError
from ..core.image import Volume
from ..core.labels import listed
from ..dicom import contours_in
from ..quality.verdict import LEAST_CONFIDENCE, Verdict, is_calibrated, overall
from ..records import FORMATS, RUN, STATUS, RecoveryRecord, RunRecord, SecondPassRecord, StatusRecord, StructureRecord
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
#: One that is not good is taken over only if the match of its second best place in the scan is worse by at least this.
LEAST_MARGIN = 0.2
#: Largest fraction of a structure that is taken over which lies on others that keep their voxels.
MOST_SHARED = 0.2


@dataclass(frozen=True)
class Try:
    """A case that is tried again, and the case that serves as its atlas."""

    case: Case
    donor: Case
    wanted: tuple[int, ...]  # label values to recover


class First(NamedTuple):
    """What the first pass found of a structure."""

    status: str
    verdict: Verdict | None
    estimate: float  # Dice; 0 where there is none
    volume_ml: float
    is_cut: bool

    @classmethod
    def of(cls, one: StructureRecord) -> First:
        """Read it from a record, recovered or not."""
        if (before := one.recovered) is not None:
            return cls(before.status, before.verdict, before.estimated_dice or 0.0, before.volume_ml, bool(one.cut))
        verdict, estimate = (None, None) if one.quality is None else (one.quality.verdict, one.quality.estimated_dice)
        return cls(one.status, verdict, estimate or 0.0, one.volume_ml, bool(one.cut))

    @property
    def is_good(self) -> bool:
        """Whether it can serve another case, and stays as it is."""
        return self.status == "present" and self.verdict in ("accepted", "good")

    @property
    def is_whole(self) -> bool:
        """Whether its volume counts: good, and not cut by the field of view."""
        return self.is_good and not self.is_cut and self.volume_ml > 0

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be recovered."""
        return self.status != "outside" and self.verdict in ("review", "failed")


#: Volumes, ml, of each structure where it is good and whole, by label value.
Volumes = Mapping[int, tuple[float, ...]]


def plan_second_pass(cases: Sequence[Case], work: SegmentWork) -> tuple[list[Try], Volumes]:
    """Choose the cases to try again, those with the lowest estimates first, and the case that helps each.

    ``cases`` are those with a result. Whether one was tried or recovered already does not matter here. Gives also the
    volumes of good structures.
    """
    if len(cases) < FEWEST_CASES or not is_calibrated(work.settings, transform_given=False):
        return [], {}
    read = ((case, read_run(work.out / case.name)) for case in sorted(cases, key=lambda case: case.name))
    found = [(case, run) for case, run in read if run is not None and case.transform is None]
    if not found:
        return [], {}
    cohort = _Cohort.of([run for _, run in found])
    lowest = np.where(cohort.wanted, cohort.estimates, np.inf).min(axis=1)
    # Scans that hardly resemble the atlas come last; equal ones stay in the order of their names.
    order = [int(n) for n in np.lexsort((lowest, cohort.is_other)) if np.isfinite(lowest[n])]
    chosen = order[: int(MOST_TRIED * len(cases))]
    donors = np.setdiff1d(np.arange(len(found)), chosen)
    tries = []
    for n in chosen:
        usable = cohort.good[donors] & cohort.wanted[n]
        if usable.any():
            best = np.lexsort((cohort.distances(n, donors, usable), -usable.sum(axis=1)))[0]
            wanted = tuple(value for value, is_it in zip(cohort.values, usable[best], strict=True) if is_it)
            tries.append(Try(found[n][0], found[donors[best]][0], wanted))
    return tries, {value: _known(volumes) for value, volumes in zip(cohort.values, cohort.volumes.T, strict=True)}


def _known(volumes: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(volumes[~np.isnan(volumes)].tolist())


@dataclass(frozen=True)
class _Cohort:
    """What the first pass found, as arrays of cases and structures."""

    values: tuple[int, ...]
    good: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    estimates: NDArray[np.float64]
    volumes: NDArray[np.float64]  # ml, where they are good and whole; else NaN
    scales: NDArray[np.float64]  # logarithms of the linear registration's, three a case
    is_other: NDArray[np.bool_]  # whether the scan hardly resembles the atlas

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> _Cohort:
        """Collect it."""
        values = tuple(sorted({one.value for run in runs for one in run.structures}))
        nothing = First("outside", None, 0.0, 0.0, False)
        tables = [{one.value: First.of(one) for one in run.structures} for run in runs]
        rows = [[table.get(value, nothing) for value in values] for table in tables]
        confidences = [run.registration.confidence for run in runs]
        matrices = [np.array(run.registration.linear_query_to_atlas_mm)[:3, :3] for run in runs]
        return cls(
            values,
            np.array([[one.is_good for one in row] for row in rows]),
            np.array([[one.is_wanted for one in row] for row in rows]),
            np.array([[one.estimate for one in row] for row in rows]),
            np.array([[one.volume_ml if one.is_whole else math.nan for one in row] for row in rows]),
            np.log([np.linalg.svd(one, compute_uv=False) for one in matrices]),
            np.array([one is not None and one < LEAST_CONFIDENCE for one in confidences]),
        )

    def distances(self, n: int, donors: NDArray[np.intp], usable: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Compute how much the donors differ from case ``n``, and how far their usable structures are from certain.

        Mean differences of log volumes (1 where no structure is good in both) and of log scales, and 1 less the mean
        estimate.
        """
        apart = np.abs(np.log(self.volumes[donors] / self.volumes[n]))
        both = ~np.isnan(apart)
        volumes = np.where(both, apart, 0).sum(axis=1) / np.maximum(both.sum(axis=1), 1) + ~both.any(axis=1)
        scales = np.abs(self.scales[donors] - self.scales[n]).mean(axis=1)
        certain = np.where(usable, self.estimates[donors], 0).sum(axis=1) / np.maximum(usable.sum(axis=1), 1)
        return np.asarray((volumes + scales + 1 - certain).round(6))


@dataclass(frozen=True)
class SecondPass(SegmentWork):
    """Second pass over some cases; goes to other processes and machines as the first does."""

    tries: Mapping[str, Try] = field(default_factory=dict)  # by name of the case
    volumes: Volumes = field(default_factory=dict)

    @classmethod
    def after(cls, work: SegmentWork, tries: Sequence[Try], volumes: Volumes) -> SecondPass:
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
        return _Recovery(self, first.context, first.model)

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


class _Recovery(Worker):
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
        run = recovered_run(run, better, labels, changed, donor.name)
        names = tuple(one.name for one in run.structures if one.value in better)
        second_pass = SecondPassRecord(donor=donor.name, recovered=names, seconds=round(seconds, 3))
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
    run: RunRecord, result: Segmentation, tried: Try, labels: Volume, volumes: Volumes
) -> tuple[dict[int, StructureRecord], str]:
    """Choose the structures of a second result that are taken over, by label value; and why none is.

    ``labels`` are those of the first; ``volumes`` those of the cohort.
    """
    if not result.registration.confidence >= LEAST_CONFIDENCE:
        return {}, f"confidence of the registration with {tried.donor.name} is {result.registration.confidence:.2f}"
    better, against, first = {}, [], {record.value: First.of(record) for record in run.structures}
    for one in result.structures:
        if one.structure.value not in tried.wanted:
            continue
        new = structure_record(one)
        found = First.of(new)
        if found.status != "present" or found.estimate - first[new.value].estimate < LEAST_GAIN:
            against.append(f"{new.name}: the estimate is no better ({found.estimate:.2f})")
        elif not found.is_good and one.place is not None and one.place.margin < LEAST_MARGIN:
            against.append(f"{new.name}: another place matches nearly as well (worse by {one.place.margin:.2f})")
        elif not found.is_cut and outliers(np.array([*volumes.get(new.value, ()), found.volume_ml]))[-1]:
            against.append(f"{new.name}: {found.volume_ml:.1f} ml are an outlier among the volumes of the cohort")
        else:
            better[new.value] = new
    while lost := [value for value in better if _shared(value, _kept(run, better), result, labels) > MOST_SHARED]:
        against += [f"{better.pop(value).name}: lies on other structures" for value in lost]
    return better, listed(against, 4, "; ")


def _kept(run: RunRecord, better: Mapping[int, StructureRecord]) -> list[int]:
    """Structures that lose no voxel: all but those that failed, or are replaced."""
    return [one.value for one in run.structures if one.value not in better and First.of(one).verdict != "failed"]


def _shared(value: int, kept: Sequence[int], result: Segmentation, labels: Volume) -> float:
    return float(np.isin(labels.data[result.labels.data == value], kept).mean())


def merge(
    run: RunRecord, result: Segmentation, better: Mapping[int, StructureRecord], labels: Volume
) -> tuple[Volume, set[int]]:
    """Put structures of a second result into the labels of the first; only failed ones lose voxels to them.

    Gives also the values of all structures that changed.
    """
    data = np.where(np.isin(labels.data, [*better]), 0, labels.data).astype(labels.data.dtype)
    taken = np.isin(result.labels.data, [*better]) & ~np.isin(data, _kept(run, better))
    changed = {*better, *np.unique(data[taken]).tolist()} - {0}
    data[taken] = result.labels.data[taken]
    return Volume(data, labels.grid, labels.source), changed


def recovered_run(
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
            before = RecoveryRecord(
                donor=donor,
                status=one.status,
                verdict=first.verdict,
                estimated_dice=estimate,
                volume_ml=first.volume_ml,
            )
            one = better[one.value].model_copy(update={"recovered": before, "volume_ml": volume_ml})
        elif one.value in changed:
            one = one.model_copy(update={"volume_ml": volume_ml})
            if not volume_ml:
                reason = "all its voxels went to structures of the second pass"
                quality = one.quality and one.quality.model_copy(update={"verdict": "failed", "reason": reason})
                one = one.model_copy(update={"status": "absent", "reason": reason, "quality": quality})
        structures.append(one)
    verdict = overall([one.quality.verdict for one in structures if one.quality is not None])
    return run.model_copy(update={"structures": tuple(structures), "verdict": verdict})
