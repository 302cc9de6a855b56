"""Table of a cohort: a row for each structure of each case, for spreadsheets and scripts."""

import csv
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import InputError
from ..core.files import atomic_path
from ..records import RUN, CaseRecord, RunRecord

#: Columns of ``cohort.csv``.
COLUMNS = (
    *("case", "query", "state", "in_run", "structure", "label", "status", "volume_ml", "cut_fraction", "verdict"),
    *("estimated_dice", "low", "high", "recovered_from", "remark", "seconds"),
)


def read_run(folder: Path) -> RunRecord | None:
    """Read ``run.json`` of a result folder; None if there is none that can be read."""
    try:
        return RunRecord.read(folder / RUN)
    except InputError:
        return None


def write_table(cases: Iterable[CaseRecord], out: Path, path: Path) -> None:
    """Write the table of cases whose results are in ``out``.

    A case without a result has one row, with its reason as remark. Volumes of structures that are cut by the field of
    view are those of the part in view; ``cut_fraction`` is the fraction of the atlas's structure outside it.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        table.writeheader()
        for case in cases:
            common = {"case": case.case, "query": case.query, "state": case.state, "in_run": case.in_run}
            run = read_run(out / case.case) if case.state == "done" else None
            if run is None:
                table.writerow({**common, "remark": case.reason})
            for one in run.structures if run is not None else ():
                quality = one.quality
                judged = () if quality is None else ("verdict", "estimated_dice", "low", "high")
                table.writerow(
                    {
                        **common,
                        "structure": one.name,
                        "label": one.value,
                        "status": one.status,
                        "volume_ml": one.volume_ml,
                        "cut_fraction": one.outside_fraction,
                        **{name: getattr(quality, name) for name in judged},
                        "recovered_from": "" if one.recovered is None else one.recovered.donor,
                        "remark": (quality.reason if quality is not None else "") or one.reason,
                        "seconds": case.seconds,
                    }
                )
