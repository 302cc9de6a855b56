"""Protocols over labelled datasets: all methods compared on the same pairs.

The labels of a query are read here to score results, and given to nothing that makes them. The one exception is
"user click" in the ablation: a simulated user who sees the structure clicks into its middle.
"""

from .plan import METHODS, Plan, Variant
from .protocols import PROTOCOLS, Pair, draw_sets, make_pairs
from .records import PairRecord, Row
from .runner import run
from .tables import write_reports

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "Pair",
    "PairRecord",
    "Plan",
    "Row",
    "Variant",
    "draw_sets",
    "make_pairs",
    "run",
    "write_reports",
]
