"""One subject, many queries: what is to be done, by whom, how it went, and going on where it stopped.

- :mod:`.plan`: which cases there are, and which of them are done already with the same files, settings and program;
- :mod:`.work`: what is done with one case, and what is noted of it;
- :mod:`.pool`: by whom, on this machine; :mod:`.cluster`: on several, by Dask;
- :mod:`.run`: all of it together, and the summary ``cohort.json``.

Each case ends in a folder of its own with ``status.json``, put in place as a whole. There is no other state: a run that
was killed goes on from what these files say.
"""

from __future__ import annotations

from .plan import Case, Shard, parse_shard, plan_cases
from .run import Outcome, Row, run_cohort, summary_name
from .work import Annotated, AtlasFiles, ContextFolder, Output, SegmentWork, Watcher

__all__ = [
    "Annotated",
    "AtlasFiles",
    "Case",
    "ContextFolder",
    "Outcome",
    "Output",
    "Row",
    "SegmentWork",
    "Shard",
    "Watcher",
    "parse_shard",
    "plan_cases",
    "run_cohort",
    "summary_name",
]
