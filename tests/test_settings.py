"""Settings: overrides, files, printing; every mistake gets a sentence."""

from __future__ import annotations

import tomllib
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from atlassegfm.core.config import known_fields, load_toml, to_dict, to_toml, with_file, with_overrides, with_table
from atlassegfm.core.errors import InputError

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=CONFIG)
class Inner:
    """Inner settings.

    Not printed.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Some share, in ``[0, 1]``."""

    steps: Annotated[int, Field(gt=0)] = 10
    """How many."""

    sizes: tuple[int, ...] = (3, 5)
    """Odd sizes."""

    active: bool = True
    """Whether at all."""

    start: Literal["best"] | Annotated[float, Field(ge=0, le=1)] = "best"
    """A word or a number."""

    limit: float | None = None
    """None for no limit."""

    @field_validator("sizes")
    @classmethod
    def _odd(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(size % 2 == 0 for size in sizes):
            raise ValueError("expected odd sizes, as 3, 5")
        return sizes


@dataclass(frozen=True, config=CONFIG)
class Outer:
    """Outer settings."""

    inner: Inner = field(default_factory=Inner)
    """A group."""

    kind: Literal["soft", "hard"] = "soft"
    """What kind."""

    name: str = "none"
    """Free text."""


def test_overrides_change_one_value_each() -> None:
    changed = with_overrides(
        Outer(), ["inner.share=0.25", "kind=hard", "inner.active=false", "inner.sizes=[7]", 'name="a b"']
    )
    assert changed == Outer(inner=Inner(share=0.25, active=False, sizes=(7,)), kind="hard", name="a b")
    assert with_overrides(changed, ["inner.share = 1", "inner.start=0.5", "inner.limit=2"]).inner == Inner(
        share=1, active=False, sizes=(7,), start=0.5, limit=2
    )
    assert with_overrides(changed, []) == changed


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.share", "--set inner.share: expected key=value, such as inner.share=0.5"),
        ("=3", "--set =3: expected key=value"),
        ("inner.shar=1", "unknown setting 'inner.shar' (did you mean 'inner.share'?); closest settings: inner.share, "),
        ("share=1", "unknown setting 'share' (did you mean 'inner.share'?); closest settings: inner.share, "),
        ("kind.deep=1", "unknown setting 'kind.deep' (did you mean 'kind'?); closest settings: kind, "),
        ("inner=1", "inner is a group of settings; set one of inner.share, inner.steps"),
        ("inner.share=2", "--set inner.share=2: inner.share is 2; expected a number from 0 to 1"),
        ("inner.share=nan", "inner.share is nan; expected a number from 0 to 1"),
        ("inner.share=much", "inner.share is 'much'; expected a number from 0 to 1"),
        ("inner.steps=0", "inner.steps is 0; expected a whole number above 0"),
        ("inner.steps=1.5", "inner.steps is 1.5; expected a whole number above 0"),
        ("inner.active=maybe", "inner.active is 'maybe'; expected true or false"),
        ("inner.sizes=[2]", "inner.sizes is [2]; expected odd sizes, as 3, 5"),
        ("inner.sizes=x", "inner.sizes is 'x'; expected a list, each a whole number"),
        ("inner.start=worst", "inner.start is 'worst'; expected best or a number from 0 to 1"),
        ("kind=warm", "kind is 'warm'; expected one of soft, hard"),
        ("kind=true", "kind is true; expected one of soft, hard"),
    ],
)
def test_mistakes_in_overrides(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        with_overrides(Outer(), [assignment])
    assert message in str(caught.value)
    assert str(caught.value).startswith("--set ")


def test_an_unknown_key_is_answered_with_the_five_closest() -> None:
    with pytest.raises(InputError) as caught:
        with_overrides(Outer(), ["inner.size=1"])
    listed = str(caught.value).partition("closest settings: ")[2].split(", ")
    assert listed[0] == "inner.sizes"
    assert len(listed) == 5 < len(known_fields(Outer))


def test_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('\ufeffkind = "hard"\n[inner]\nsteps = 3\n', encoding="utf-8")
    before = Outer(inner=Inner(share=0.1))
    assert with_file(before, path) == Outer(inner=Inner(share=0.1, steps=3), kind="hard")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"kind = \n", "settings.toml: not valid TOML: Invalid value (at line 1, column 8)"),
        (
            b"[inner]\nshares = 1\n",
            "settings.toml: unknown setting 'inner.shares' (did you mean 'inner.share'?)",
        ),
        (b"[inner]\nshare = 7\n", "settings.toml: inner.share is 7; expected a number from 0 to 1"),
        (b"inner = 7\n", "settings.toml: inner is a group of settings"),
        (b"\xff\xfe\x00", "settings.toml: not a text file; expected a settings file in TOML"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        with_file(Outer(), path)
    assert f"{tmp_path}/{message}" in str(caught.value)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected a settings file in TOML"):
        load_toml(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="cannot be opened"):
        load_toml(tmp_path)


def test_tables_are_named_in_messages() -> None:
    with pytest.raises(InputError, match=r"^--seed: kind is 3; expected one of soft, hard$"):
        with_table(Outer(), {"kind": 3}, origin="--seed")


def test_printed_settings_are_read_back(tmp_path: Path) -> None:
    settings = Outer(inner=Inner(share=0.125, sizes=(1, 3, 5), start=0.75), kind="hard", name='quo"te')
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert with_file(Outer(), path) == settings


def test_printed_settings_explain_themselves() -> None:
    text = to_toml(Outer())
    assert '# What kind. Allowed: one of soft, hard.\nkind = "soft"\n' in text
    assert "# Some share, in [0, 1]. Allowed: a number from 0 to 1.\nshare = 0.5\n" in text
    assert "# Inner settings.\n[inner]\n" in text
    assert "# Free text.\nname = " in text
    assert "# limit =\n" in text  # TOML has no null
    assert "Not printed" not in text
    assert tomllib.loads(text)["inner"]["sizes"] == [3, 5]


def test_to_dict() -> None:
    assert to_dict(Outer()) == {
        "inner": {"share": 0.5, "steps": 10, "sizes": [3, 5], "active": True, "start": "best", "limit": None},
        "kind": "soft",
        "name": "none",
    }


def test_an_empty_list_of_a_level_is_refused() -> None:
    from atlassegfm.settings import Settings

    for name in ("level_voxels", "iterations", "smoothness", "contrast_robust_mind_weight"):
        with pytest.raises(InputError, match=rf"registration\.instance\.{name} is \[\]; expected a list, each "):
            with_overrides(Settings(), [f"registration.instance.{name}=[]"])
