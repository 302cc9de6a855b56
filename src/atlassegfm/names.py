"""Which structure a user means by a label value, a name or a pattern, and lists of names for messages.

Names are compared without regard to capitals, and spaces, underscores and hyphens are one and the same:
"Left kidney", "left_kidney" and "LEFT-KIDNEY" are one name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

#: A message that lists names stops after so many: about two lines of a terminal.
_LONGEST_LIST = 15


def plain_name(name: str) -> str:
    """A name as it is compared: no capitals, one space for each run of spaces, underscores and hyphens.

    What stands in square brackets keeps its hyphens, as "[a-c]" in a pattern is a range.
    """
    return re.sub(r"(\[[^\]]*\])|[\s_-]+", lambda found: found[1] or " ", name.casefold()).strip()


def match_rank(wanted: str, value: int, name: str) -> int | None:
    """How a structure fits what a user wrote.

    Parameters
    ----------
    wanted : str
        A label value ("6"), a name ("left kidney") or a shell pattern (``*kidney*``).
    value : int
        Label value of the structure.
    name : str
        Its name.

    Returns
    -------
    int or None
        0 if ``wanted`` is its value, 1 if it is its name, 2 if it is a pattern of its name; None if it is none
        of these. The lower one is meant where several fit.
    """
    if wanted.strip().isdecimal() and int(wanted) == value:
        return 0
    wanted, name = plain_name(wanted), plain_name(name)
    if wanted == name:
        return 1
    return 2 if fnmatchcase(name, wanted) else None


def closest(wanted: str, known: Iterable[str]) -> str | None:
    """The known name most like a misspelt one; None if none is like it."""
    by_plain = {plain_name(name): name for name in known}
    found = difflib.get_close_matches(plain_name(wanted), by_plain, n=1)
    return by_plain[found[0]] if found else None


def listed(names: Sequence[str], limit: int = _LONGEST_LIST) -> str:
    """Names for a message: "a, b, c", or the first ``limit`` of them "and 4 more"."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
