"""Words for messages: counts, durations, and what a misspelt word may mean."""

import difflib
from collections.abc import Iterable


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a number and its noun: "1 case", "2 cases"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """Text for a message, " (did you mean 'x'?)", with the known name most like a misspelt one; empty without one."""
    by_plain = {name.lower(): name for name in known}
    found = difflib.get_close_matches(wanted.lower(), by_plain, n=1)
    return f" (did you mean {by_plain[found[0]]!r}?)" if found else ""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, rounded to about two digits."""
    unit, size = next((one for one in (("h", 3600), ("min", 60)) if seconds >= 2 * one[1]), ("s", 1))
    return f"{seconds / size:.0f} {unit}"
