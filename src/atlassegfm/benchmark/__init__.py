"""Protocols over labelled datasets: every method side by side, each figure with the pairs behind it.

The labels of a query are opened here, to score what the method has made without them, and handed to nothing
that makes it. The one exception says so: "user click" in the ablation, where a simulated user who sees the
structure clicks into its middle.
"""

from __future__ import annotations

from .plan import METHODS, Plan, Variant
from .protocols import PROTOCOLS, Pair, make_pairs
from .records import PairRecord, Row
from .runner import run
from .tables import write_reports

__all__ = ["METHODS", "PROTOCOLS", "Pair", "PairRecord", "Plan", "Row", "Variant", "make_pairs", "run", "write_reports"]
