"""What it costs to keep account of a cohort, with nothing to compute: planning, statuses, going on, the summary.

python benchmarks/cohort_bookkeeping.py [--sizes 1000,10000]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atlassegfm.core.files import replaced_folder
from atlassegfm.core.parallel import peak_memory_mb, reset_peak_memory
from atlassegfm.jobs import Case, Outcome, plan_cases, run
from atlassegfm.jobs.fingerprint import file_record
from atlassegfm.jobs.pool import run_here
from atlassegfm.jobs.work import Row
from atlassegfm.records import RESULT_NAMES, RUN, SEGMENTATION, STATUS, Provenance, StatusRecord
from atlassegfm.settings import Settings

#: A query stands in with as many bytes: its content is read once, as that of a scan is.
QUERY_BYTES = 4096


@dataclass(frozen=True)
class StandIn:
    """Writes the files of a result without computing any."""

    out: Path
    device: str = "cpu"
    threads: int = 1
    settings: Settings = field(default_factory=Settings)

    @property
    def key(self) -> str:
        """Of this work."""
        return "stand-in"

    @property
    def provenance(self) -> Provenance:
        """What results depend on."""
        digests = dict.fromkeys(("version", "settings", "context", "context_version", "weights"), "0" * 32)
        return Provenance(**digests, keep=False, formats=("nifti",), series=None)

    @property
    def environment(self) -> Mapping[str, str]:
        """Nothing."""
        return {}

    def absolute(self) -> StandIn:
        """Itself."""
        return self

    def open(self, _context: object = None) -> Callable[[Case, int, Callable[[str], None]], Row]:
        """Nothing to load."""

        def do(case: Case, attempt: int, tell: Callable[[str], None]) -> Row:
            tell("writing")
            made_from = self.provenance.model_copy(update={"query": file_record(case.query)})
            status = StatusRecord(state="done", provenance=made_from)
            with replaced_folder(self.out / case.name, RESULT_NAMES) as new:
                (new / SEGMENTATION).write_bytes(b"")
                (new / RUN).write_text("{}")
                status.write(new / STATUS)
            return Row(case, "done", attempts=attempt)

        return do

    def give_up(self, case: Case, reason: str, attempts: int) -> Row:
        """Never happens."""
        raise NotImplementedError


class Silent:
    """Watches and says nothing."""

    def begun(self, case: Case) -> None:
        """Nothing."""

    def stage(self, case: Case, text: str) -> None:
        """Nothing."""

    def planned(self, outcome: Outcome) -> None:
        """Nothing."""

    def ended(self, row: object) -> None:
        """Nothing."""


def main() -> None:
    """Time each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,10000")
    print(" queries   plan s    run s  ms a case  again s  MB more  summary MB")
    for size in parser.parse_args().sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), int(size))


def measure(folder: Path, count: int) -> None:
    """One size: a first run, and one that finds all done."""
    scans, out = folder / "scans", folder / "out"
    scans.mkdir()
    out.mkdir()
    for number in range(count):
        (scans / f"case{number:06d}.nii.gz").write_bytes(number.to_bytes(8, "little") * (QUERY_BYTES // 8))
    gc.collect()
    reset_peak_memory()
    before = peak_memory_mb() or 0
    start = time.perf_counter()
    cases = plan_cases(sorted(scans.iterdir()), out)
    planned = time.perf_counter()
    first = run(cases, StandIn(out), run_here, Silent())
    ran = time.perf_counter()
    again = run(plan_cases(sorted(scans.iterdir()), out), StandIn(out), run_here, Silent())
    ended = time.perf_counter()
    check(first, again, count)
    more = (peak_memory_mb() or 0) - before
    size = (out / "cohort.json").stat().st_size / 1e6
    print(
        f"{count:8d} {planned - start:8.2f} {ran - planned:8.2f} {(ran - planned) / count * 1000:10.2f} "
        f"{ended - ran:8.2f} {more:8d} {size:11.2f}"
    )


def check(first: Outcome, again: Outcome, count: int) -> None:
    """Figures of a run that did something else are worth nothing."""
    if (first.count("done"), first.kept, again.kept) != (count, 0, count):
        raise SystemExit("the runs did not do what they should")


if __name__ == "__main__":
    main()
