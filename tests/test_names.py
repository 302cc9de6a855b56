"""Which structure a value, a name or a pattern means, and lists of names for messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm.core.labels import hint, listed, match_rank, plain_name


@pytest.mark.parametrize("name", ["left kidney", "Left_Kidney", "LEFT-KIDNEY", " left _- kidney ", "left\tkidney"])
def test_spellings_of_one_name(name: str) -> None:
    assert plain_name(name) == "left kidney"
    assert match_rank(name, 3, "left_kidney") == 1


@given(st.text())
def test_plain_name_is_its_own(name: str) -> None:
    assert plain_name(plain_name(name)) == plain_name(name)


@pytest.mark.parametrize(
    ("wanted", "rank"),
    [
        ("3", 0),
        ("03", 0),
        ("left kidney", 1),
        ("*kidney*", 2),
        ("LEFT_*", 2),
        ("left?kidney", 2),
        ("[k-m]eft*", 2),
        ("[A-C]eft*", None),
        ("kidney", None),
        ("4", None),
        ("-3", None),
        ("", None),
    ],
)
def test_match_rank(wanted: str, rank: int | None) -> None:
    assert match_rank(wanted, 3, "left_kidney") == rank


def test_names_that_look_like_something_else() -> None:
    assert match_rank("7", 3, "7") == 1
    assert match_rank("node [left]", 3, "node_[left]") == 1


def test_hint() -> None:
    assert "'left_kidney'" in hint("LEFT kidny", ["liver", "left_kidney"])
    assert hint("xyz", ["liver"]) == ""


def test_listed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c"], 1) == "a and 2 more"
    assert listed([str(n) for n in range(16)]).endswith("13, 14 and 1 more")
