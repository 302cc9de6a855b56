"""Tolerances of the normalized surface Dice (NSD): distance between two surfaces that still agree.

They come as one number for all structures, from a preset (tables of published benchmarks) or from a file:

.. code-block:: toml

    default_mm = 2.0                # required: all other structures
    source = "our two readers"      # optional

    [tolerance_mm]
    6 = 5.0                         # a label value
    "left kidney" = 2.5             # a name
    "*kidney*" = 3.0                # a pattern

Values come before names, names before patterns; of several patterns the first one counts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.config import load_toml
from ...core.errors import InputError
from ...core.labels import match_rank, plain_name

#: File of each preset; it names its source.
PRESETS: Mapping[str, str] = {"flare22": "flare22.toml", "kits21": "kits21.toml", "nikolov": "nikolov.toml"}
_KEYS = ("default_mm", "tolerance_mm", "source")


@dataclass(frozen=True)
class Tolerances:
    """NSD tolerance of every structure, finite and at least 0; patterns are not empty, and given once (InputError)."""

    default_mm: float  # for structures that no pattern matches
    patterns: tuple[tuple[str, float], ...]  # label value, name or shell pattern, and its tolerance in mm
    origin: str  # to be printed with every NSD: "2 mm for all", "preset flare22" or a file
    source: str = ""  # source of the numbers, as the file says

    def __post_init__(self) -> None:
        numbers: tuple[tuple[str, Any], ...] = (("default_mm", self.default_mm), *self.patterns)
        for key, number in numbers:
            # From a file: may be anything, and bool is an int in Python.
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise InputError(
                    f"{self.origin}: the tolerance of {key!r} is {number!r}; expected a finite number of mm, at least 0"
                )
        seen: dict[str, str] = {}
        for key, _ in self.patterns:
            plain = plain_name(key)
            where, before = f"{self.origin}: {key!r}", seen.get(plain)
            if not plain:
                raise InputError(f"{where} names no structure; expected a label value, a name or a pattern")
            if before is not None:
                raise InputError(f"{where} is the same name as {before!r}; expected each once: remove one")
            seen[plain] = key

    def of(self, value: int, name: str) -> float:
        """Look up the tolerance of a structure by label value and name, mm."""
        ranked = [(match_rank(pattern, value, name), tolerance_mm) for pattern, tolerance_mm in self.patterns]
        fitting = [(rank, tolerance_mm) for rank, tolerance_mm in ranked if rank is not None]
        # Of equal ranks, min gives the one written first.
        return float(min(fitting, key=lambda one: one[0], default=(0, self.default_mm))[1])

    def unmatched(self, structures: Iterable[tuple[int, str]]) -> tuple[str, ...]:
        """Find patterns that match none of these structures (label value, name): probably misspelt."""
        known = tuple(structures)
        return tuple(pattern for pattern, _ in self.patterns if all(match_rank(pattern, *one) is None for one in known))


def uniform(tolerance_mm: float) -> Tolerances:
    """Use one tolerance, finite and at least 0, for every structure."""
    return Tolerances(tolerance_mm, (), f"{tolerance_mm:g} mm for all")


def load_tolerances(name_or_file: str) -> Tolerances:
    """Read one of :data:`PRESETS`, or a TOML file of this module's form ("./flare22"); else an :class:`.InputError`."""
    is_preset = name_or_file in PRESETS
    path = Path(__file__).with_name(PRESETS[name_or_file]) if is_preset else Path(name_or_file)
    origin = f"preset {name_or_file}" if is_preset else name_or_file
    if not path.exists():
        known = ", ".join(PRESETS)
        raise InputError(f"{name_or_file}: neither a preset nor a file; expected {known} or a TOML file of tolerances")
    table = load_toml(path, "a file of tolerances")
    if unknown := [key for key in table if key not in _KEYS]:
        known = f"{', '.join(_KEYS)}: write tolerances of structures below [tolerance_mm]"
        raise InputError(f"{origin}: unknown key {unknown[0]!r}; expected {known}")
    if "default_mm" not in table:
        raise InputError(f"{origin}: no default_mm; add the tolerance of all other structures, as default_mm = 2.0")
    patterns, source = table.get("tolerance_mm", {}), table.get("source", "")
    if not isinstance(patterns, Mapping):
        raise InputError(f"{origin}: tolerance_mm is {patterns!r}; expected a table: begin it with [tolerance_mm]")
    if not isinstance(source, str):
        raise InputError(f"{origin}: source is {source!r}; expected text in quotes")
    return Tolerances(table["default_mm"], tuple(patterns.items()), origin, source)
