"""Run of a benchmark: pair after pair, every variant on each, kept on disk so that a killed run continues.

A finished pair is a file ``pairs/VARIANT/ATLAS/QUERY.json``. ``plan.json`` says what they were made with; a folder made
with something else is refused. Other pairs may be added, and a pair whose files have changed is computed again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..jobs.fingerprint import file_record, is_unchanged
from .pairs import PairRunner
from .plan import OUTPUTS, PAIRS, PLAN, Plan, Variant, slug
from .protocols import Pair
from .records import PairRecord, PlanRecord

logger = logging.getLogger(__name__)


def run(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    on_pair: Callable[[int, int, str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> list[PairRecord]:
    """Run all pairs that are not done yet.

    Parameters
    ----------
    plan : Plan
        What to run.
    out : Path
        Folder of the benchmark, made if it is not there.
    force : bool
        Whether to begin again where the folder holds another benchmark, or the same one.
    on_pair : callable, optional
        Told number (from 1), count and name of each pair as it begins.
    on_stage : callable, optional
        Told of each stage.

    Returns
    -------
    list of PairRecord
        Variant by variant, in the order of the pairs.

    Raises
    ------
    InputError
        If the folder holds something else, or a file of the dataset cannot be used. What is done by then is kept.
    AtlasSegError
        If a model cannot be loaded, before anything is written.
    """
    store = {
        (variant.name, pair): out / PAIRS / slug(variant.name) / pair.atlas / f"{pair.query}.json"
        for variant in plan.variants
        for pair in plan.pairs
    }
    runner = PairRunner(plan)
    # Missing weights are an error now, not after hours of other variants.
    for variant in plan.variants:
        if force or not all(store[variant.name, pair].exists() for pair in plan.pairs):
            runner.load(variant)
    _prepare(plan, out, force=force)
    done = {key: record for key, path in store.items() if (record := _stored(path, plan, key[1])) is not None}
    todo = [(variant, pair) for variant, pair in _alternating(plan) if (variant.name, pair) not in done]
    if todo and len(todo) < len(store):
        logger.warning("%s: %d of %d are done already", out, len(store) - len(todo), len(store))
    for number, (variant, pair) in enumerate(todo, start=1):
        if on_pair is not None:
            name = f"{pair.atlas} -> {pair.query}" + (f" ({variant.name})" if len(plan.variants) > 1 else "")
            on_pair(number, len(todo), name)
        files = tuple(map(file_record, plan.files(pair)))
        record = runner.run(variant, pair, on_stage).model_copy(update={"files": files})
        done[variant.name, pair] = record
        path = store[variant.name, pair]
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write(path)
    return [done[key] for key in store]


def _alternating(plan: Plan) -> Iterator[tuple[Variant, Pair]]:
    for number, pair in enumerate(plan.pairs):
        first = number % len(plan.variants)
        for variant in (*plan.variants[first:], *plan.variants[:first]):
            yield variant, pair


def _prepare(plan: Plan, out: Path, *, force: bool) -> None:
    """Make the folder, or check that what it holds is a part of this benchmark."""
    folders = {slug(variant.name): variant.name for variant in plan.variants}
    for variant in plan.variants:
        if folders[slug(variant.name)] != variant.name:
            raise InputError(
                f"the variants {variant.name!r} and {folders[slug(variant.name)]!r} would share a folder; rename one"
            )
    wanted = plan.record()
    path = out / PLAN
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is in the way, expected a folder for the benchmark; choose another")
    if out.is_dir():
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in OUTPUTS)
        foreign = [name for name in foreign if not name.startswith(".writing-")]
        if foreign:
            raise InputError(f"{out}: holds other files ({foreign[0]}); choose another folder for the benchmark")
        if force:
            shutil.rmtree(out / PAIRS, ignore_errors=True)
            for name in OUTPUTS - {PAIRS}:
                (out / name).unlink(missing_ok=True)
    if path.exists():
        try:
            found = PlanRecord.read(path)
        except InputError as error:
            raise InputError(f"{error}; begin again with --force, or choose another folder") from None
        differing = [key for key in PlanRecord.model_fields if getattr(found, key) != getattr(wanted, key)]
        if differing:
            named = ", ".join(_difference(key, getattr(found, key), getattr(wanted, key)) for key in differing)
            raise InputError(
                f"{out}: holds a benchmark made with other {named}; choose another folder, or begin again with --force"
            )
        return
    if (out / PAIRS).exists():
        raise InputError(f"{out}: holds results without {PLAN}, which says of what; choose another folder, or --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another place") from None
    wanted.write(path)


def _difference(key: str, found: Any, wanted: Any) -> str:
    """What differs between two plans; short values are named."""
    if isinstance(wanted, dict | tuple):
        return key
    return f"{key} ({found} there, {wanted} now)"


def _stored(path: Path, plan: Plan, pair: Pair) -> PairRecord | None:
    """The record of a pair whose files are as they were; None if it has to be computed."""
    if not path.exists():
        return None
    try:
        record = PairRecord.read(path)
    except InputError as error:
        raise InputError(f"{error}; delete it, and it is computed again") from None
    files = plan.files(pair)
    if len(files) != len(record.files) or not all(map(is_unchanged, files, record.files)):
        logger.warning("%s -> %s: files have changed, and it is computed again", pair.atlas, pair.query)
        return None
    return record
