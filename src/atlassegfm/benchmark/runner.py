"""Run of a benchmark: every variant on one pair after the other, kept on disk so that a killed run continues.

A finished pair is a file ``pairs/VARIANT/ATLAS/QUERY.json``. A folder whose ``plan.json`` differs is refused. Pairs may
be added, and a pair whose files have changed is computed again.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

from ..core.errors import InputError
from ..core.files import check_replaceable, disk_errors
from ..core.labels import listed
from ..jobs.fingerprint import file_record, is_unchanged
from .pairs import PairRunner
from .plan import OUTPUTS, PAIRS, PLAN, TREES, Plan, Variant, slug
from .protocols import Pair
from .records import PairRecord, PlanRecord

logger = logging.getLogger(__name__)


def run(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    on_planned: Callable[[int, int], None] | None = None,
    on_pair: Callable[[int, int, str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> list[PairRecord]:
    """Run all pairs that are not done yet, or all with ``force``; the records are in the order of variants and pairs.

    ``out`` is the folder of the benchmark, made if it is not there. ``on_planned`` is called with the numbers of pairs
    that are kept and to do, ``on_pair`` with number (from 1), count and name of each pair as it begins, ``on_stage``
    with the name of each stage. A record has no rows where a file of its pair cannot be used.

    InputError if the folder holds something else, or no pair can be scored: finished pairs are kept. AtlasSegError if a
    model cannot be loaded, before anything is written.
    """
    store = {
        (variant.name, pair): out / PAIRS / slug(variant.name) / pair.atlases / f"{pair.query}.json"
        for variant in plan.variants
        for pair in plan.pairs
    }
    runner = PairRunner(plan, on_stage)
    # Missing weights are an error now, not after hours of other variants.
    for variant in plan.variants:
        if force or not all(store[variant.name, pair].exists() for pair in plan.pairs):
            runner.load(variant)
    _prepare(plan, out, force=force)
    done = {key: record for key, path in store.items() if (record := _stored(path, plan, key[1])) is not None}
    todo = [(variant, pair) for variant, pair in _alternating(plan) if (variant.name, pair) not in done]
    if on_planned is not None:
        on_planned(len(done), len(todo))
    for number, (variant, pair) in enumerate(todo, start=1):
        if on_pair is not None:
            name = f"{pair.atlases} -> {pair.query}" + (f" ({variant.name})" if len(plan.variants) > 1 else "")
            on_pair(number, len(todo), name)
        try:
            files = tuple(map(file_record, plan.files(pair)))
        except OSError:
            files = ()  # reading them says what is wrong
        record = done[variant.name, pair] = runner.run(variant, pair).model_copy(update={"files": files})
        if not record.rows:
            continue  # the next run tries again
        path = store[variant.name, pair]
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write(path)
    records = [done[key] for key in store]
    if not any(record.rows for record in records):
        raise InputError(listed([*dict.fromkeys(record.failure for record in records)], 3, "; "))
    return records


def _alternating(plan: Plan) -> Iterator[tuple[Variant, Pair]]:
    for number, pair in enumerate(plan.pairs):
        first = number % len(plan.variants)
        for variant in (*plan.variants[first:], *plan.variants[:first]):
            yield variant, pair


def _prepare(plan: Plan, out: Path, *, force: bool) -> None:
    """Make the folder, or check that what it holds is a part of this benchmark."""
    for one, other in combinations([variant.name for variant in plan.variants], 2):
        if slug(one) == slug(other):
            raise InputError(f"the variants {one!r} and {other!r} would have one folder; rename one")
    wanted, path = plan.record(), out / PLAN
    unfinished = {entry.name for entry in out.glob(".writing-*")}  # of killed processes
    check_replaceable(out, OUTPUTS | unfinished)
    if force:
        shutil.rmtree(out / PAIRS, ignore_errors=True)
        for name in OUTPUTS - {PAIRS, TREES}:
            (out / name).unlink(missing_ok=True)
    if path.exists():
        try:
            found = PlanRecord.read(path)
        except InputError as error:
            raise InputError(f"{error}; begin again with --force, or choose another folder") from None
        there, now = vars(found), vars(wanted)
        differing = [
            key if isinstance(value, dict | tuple) else f"{key} ({there[key]} there, {value} now)"
            for key, value in now.items()
            if there[key] != value
        ]
        if differing:
            raise InputError(
                f"{out}: holds a benchmark made with other {', '.join(differing)}; choose another folder, or begin "
                "again with --force"
            )
        return
    if (out / PAIRS).exists():
        raise InputError(f"{out}: holds results without {PLAN}, which says of what; choose another folder, or --force")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    wanted.write(path)


def _stored(path: Path, plan: Plan, pair: Pair) -> PairRecord | None:
    """Read the record of a pair; None if it has to be computed, as there is none or its files have changed."""
    if not path.exists():
        return None
    try:
        record = PairRecord.read(path)
    except InputError as error:
        raise InputError(f"{error}; delete it to compute the pair again") from None
    files = plan.files(pair)
    if len(files) != len(record.files) or not all(map(is_unchanged, files, record.files)):
        logger.warning("%s -> %s: files have changed; computed again", pair.atlases, pair.query)
        return None
    return record
