"""One job path for one query and for many.

Each case ends in a folder of its own with ``status.json``, put in place as a whole. There is no other state: a run that
was killed continues from these files.
"""

from .plan import Case, parse_shard, plan_cases
from .run import Outcome, RunOptions, run
from .scans import Scans, find_scans, scans_of
from .work import AtlasFiles, ContextFolder, Output, Row, SegmentWork, provenance_of

__all__ = ["AtlasFiles", "Case", "ContextFolder", "Outcome", "Output", "Row", "RunOptions", "Scans", "SegmentWork"]
__all__ += ["find_scans", "parse_shard", "plan_cases", "provenance_of", "run", "scans_of"]
