"""One job path for one query and for many.

- :mod:`.scans`: scans below folders;
- :mod:`.plan`: which queries, and where their results go;
- :mod:`.work`: read, segment and write one case;
- :mod:`.store`: result folders, and whether a result is still what would be computed now;
- :mod:`.pool`: in this process or several; :mod:`.cluster`: on several machines, by Dask;
- :mod:`.second_pass`: structures that are not good, tried again with another case as the atlas;
- :mod:`.run`: all of it together.

Each case ends in a folder of its own with ``status.json``, put in place as a whole. There is no other state: a run that
was killed continues from these files.
"""

from .plan import Case, parse_shard, plan_cases
from .run import Outcome, RunOptions, run
from .scans import Scans, find_scans, scans_of
from .work import AtlasFiles, ContextFolder, Output, Row, SegmentWork, provenance_of

__all__ = [
    "AtlasFiles",
    "Case",
    "ContextFolder",
    "Outcome",
    "Output",
    "Row",
    "RunOptions",
    "Scans",
    "SegmentWork",
    "find_scans",
    "parse_shard",
    "plan_cases",
    "provenance_of",
    "run",
    "scans_of",
]
