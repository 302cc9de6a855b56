"""File names of BIDS, the Brain Imaging Data Structure: entities and a suffix, as in ``sub-01_ses-1_run-2_T1w``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .errors import InputError
from .image import image_stem

_ENTITY = re.compile(r"([a-z]+)-([0-9A-Za-z+]+)")
_SUFFIX = re.compile(r"[0-9A-Za-z]+")
#: Entities that come behind "space" in a name: the order of the BIDS schema.
_AFTER_SPACE = ("split", "recording", "chunk", "atlas", "seg", "scale", "res", "den", "label", "desc")

#: Values to take by entity ("sub", "ses"); suffixes ("T1w") under "".
Wanted: TypeAlias = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class BidsName:
    """A file name taken apart; without entities where it is no BIDS name."""

    entities: Mapping[str, str] = field(default_factory=dict)  # in the order of the name; the first is "sub"
    suffix: str = ""

    @classmethod
    def of(cls, path: Path) -> BidsName:
        """Take the name of a file apart."""
        *words, suffix = image_stem(path).split("_")
        pairs = [(match[1], match[2]) for word in words if (match := _ENTITY.fullmatch(word))]
        entities: dict[str, str] = dict(pairs)
        if not pairs or pairs[0][0] != "sub" or len(entities) != len(words) or not _SUFFIX.fullmatch(suffix):
            return cls()
        return cls(entities, suffix)

    def fits(self, wanted: Wanted) -> bool:
        """Check whether it has one of the wanted values of each entity, and of the suffixes."""
        own = {**self.entities, "": self.suffix}
        return all(own.get(key) in values for key, values in wanted.items())

    def derived(self, description: str, suffix: str) -> str:
        """Name a derivative on the voxels of this scan: ``sub-01_ses-1_space-orig_desc-DESCRIPTION_SUFFIX``."""
        before = {key: value for key, value in self.entities.items() if key not in ("space", *_AFTER_SPACE)}
        after = {key: value for key, value in self.entities.items() if key in _AFTER_SPACE}
        entities = {**before, "space": "orig", **after, "desc": description}
        return "_".join([*(f"{key}-{value}" for key, value in entities.items()), suffix])


def parse_wanted(words: Sequence[str]) -> Wanted:
    """Sort entities ("sub-01") and suffixes ("T1w") by what they are; InputError if one is neither."""
    wanted: dict[str, set[str]] = {}
    for word in words:
        match = _ENTITY.fullmatch(word)
        if match is None and not _SUFFIX.fullmatch(word):
            raise InputError(f"{word!r} is no BIDS entity; expected some as in file names, such as sub-01,ses-1,T1w")
        key, value = match.groups() if match else ("", word)
        wanted.setdefault(key, set()).add(value)
    return {key: frozenset(values) for key, values in wanted.items()}
