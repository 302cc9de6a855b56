"""Reading, changing and printing settings.

Settings are frozen dataclasses, checked by pydantic, that may hold others: ``Settings.registration.affine``
is the key ``registration.affine``. A key is written in two places, its field and the line that reads it; what
is here works on any of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .errors import InputError
from .files import PathLike


class _SettingsClass(Protocol):
    """What pydantic adds to a dataclass."""

    __pydantic_fields__: dict[str, FieldInfo]
    __dataclass_fields__: dict[str, dataclasses.Field[Any]]


S = TypeVar("S")

#: Nested keys and values, as TOML has them.
Table = Mapping[str, Any]

#: Comments in printed settings are wrapped to this width, as the code they come from.
_COMMENT_WIDTH = 100

#: Known keys listed for an unknown one.
_CLOSEST = 5


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested dictionaries of plain values; those that are None are there too."""
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    }


def with_overrides(settings: S, assignments: Sequence[str], *, option: str = "--set") -> S:
    """Settings with single values replaced, as the command line gives them.

    Parameters
    ----------
    settings : settings dataclass
        Where all others come from.
    assignments : sequence of str
        Each ``key=value``; the key is dotted, the value is written as in TOML (quotes may be left out).
    option : str
        What the user typed before them, for messages.

    Raises
    ------
    InputError
        If an assignment has no "=", its key is not known or its value not allowed.
    """
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise InputError(f"{option} {assignment}: expected key=value, such as {_example(settings)}")
        table: dict[str, Any] = {}
        inner = table
        *sections, name = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = _toml_value(text)
        settings = with_table(settings, table, origin=f"{option} {assignment}")
    return settings


def with_file(settings: S, path: PathLike) -> S:
    """Settings with the values of a TOML file in place of their own; keys the file leaves out stay.

    Raises
    ------
    InputError
        If the file cannot be read, has a key that is not known or a value that is not allowed.
    """
    return with_table(settings, load_toml(path), origin=str(path))


def with_table(settings: S, table: Table, *, origin: str) -> S:
    """Settings with the values of a nested table in place of their own.

    Parameters
    ----------
    settings : settings dataclass
        Where all other values come from.
    table : mapping
        Nested keys and values.
    origin : str
        Where the table comes from: the beginning of messages.

    Raises
    ------
    InputError
        If a key is not known or a value not allowed.
    """
    fields = known_fields(type(settings))
    _check_keys(fields, table, origin)
    merged = _merged(to_dict(settings), table)
    try:
        return TypeAdapter(type(settings)).validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = _key_of(fields, first["loc"])
        # A check of the settings' own says what it expects; else the type of the field does.
        own = first.get("ctx", {}).get("error")
        expected = describe_values(fields[key]) if key in fields and own is None else str(own or first["msg"])
        expected = expected.removeprefix("expected ")
        raise InputError(f"{origin}: {key} is {_shown(_at(merged, key))}; expected {expected}") from None


def load_toml(path: PathLike, what: str = "a settings file") -> dict[str, Any]:
    """Read a TOML file; ``what`` it should be is for messages.

    Raises
    ------
    InputError
        If it is missing, unreadable or not TOML; the message then says on which line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what} in TOML") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected {what} in TOML") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); expected {what} in TOML") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}; expected {what}: correct it") from None


def to_toml(settings: Any) -> str:
    """Settings as a TOML file, each value below the comment that explains it."""
    lines = list(_toml_lines(settings, ()))
    return "\n".join(lines).strip() + "\n"


def known_fields(settings_class: type) -> dict[str, FieldInfo]:
    """Every setting by its dotted key, in the order of the fields."""
    found = {}
    for name, field in _fields(settings_class).items():
        section = _section_class(field)
        if section is None:
            found[name] = field
        else:
            found.update({f"{name}.{key}": inner for key, inner in known_fields(section).items()})
    return found


def describe_values(field: FieldInfo) -> str:
    """The values a setting allows, in words: "true or false", "a number from 0 to 1"."""
    return _described(field.annotation, field.metadata)


def _described(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _described(arguments[0], (*metadata, *arguments[1:]))
    if origin is typing.Literal:
        choices = [str(choice) for choice in arguments]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(one, metadata) for one in arguments if one is not type(None))
    if origin is tuple:
        count = "a list" if len(arguments) == 2 and arguments[1] is ... else f"a list of {len(arguments)}"
        return f"{count}, each {_described(arguments[0], metadata)}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    return "text" if annotation is str else str(getattr(annotation, "__name__", annotation))


def _range(metadata: Sequence[Any]) -> str:
    bounds: dict[str, float] = {}
    # Inside a union, limits still lie in the Field they were written as.
    for item in (one for outer in metadata for one in (outer.metadata if isinstance(outer, FieldInfo) else [outer])):
        for name in ("ge", "gt", "le", "lt"):
            if getattr(item, name, None) is not None:
                bounds[name] = getattr(item, name)
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{word} {bounds[name]}" for name, word in words.items() if name in bounds]
    return f" {' and '.join(parts)}" if parts else ""


def _fields(settings_class: type) -> dict[str, FieldInfo]:
    return cast("_SettingsClass", settings_class).__pydantic_fields__


def _section_class(field: FieldInfo) -> type | None:
    """The settings dataclass a field holds, or None where it holds a value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def _key_of(fields: Mapping[str, FieldInfo], location: Sequence[int | str]) -> str:
    """The key an error of pydantic is about: its location may go on into lists and unions."""
    prefixes = [".".join(map(str, location[:n])) for n in range(len(location), 0, -1)]
    return next((key for key in prefixes if key in fields), ".".join(map(str, location)))


def _check_keys(fields: Mapping[str, FieldInfo], table: Table, origin: str, above: str = "") -> None:
    for name, value in table.items():
        key = f"{above}{name}"
        inside = [known for known in fields if known.startswith(f"{key}.")]
        if inside and not isinstance(value, Mapping):
            raise InputError(f"{origin}: {key} is a group of settings; set one of {', '.join(inside)}")
        if inside:
            _check_keys(fields, value, origin, f"{key}.")
        elif key not in fields or isinstance(value, Mapping):
            closest = ", ".join(_closest(fields, key))
            if key in fields:
                key = f"{key}.{next(iter(value), '')}"
            raise InputError(f"{origin}: unknown setting {key!r}; closest settings: {closest}")


def _closest(known: Iterable[str], wanted: str) -> list[str]:
    """The known keys most like the given one, best first."""

    def likeness(key: str) -> float:
        # A key written without its group is like one with it.
        pairs = ((wanted, key), (wanted.rpartition(".")[2], key.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return sorted(known, key=likeness, reverse=True)[:_CLOSEST]


def _merged(base: Mapping[str, Any], table: Table) -> dict[str, Any]:
    merged = dict(base)
    for name, value in table.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def _at(table: Table, key: str) -> Any:
    value: Any = table
    for part in key.split(".") if key else ():
        value = value[part]
    return value


def _toml_value(text: str) -> Any:
    """What TOML understands by the text; the text itself where that is nothing, as for words without quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _example(settings: Any) -> str:
    key = next(iter(known_fields(type(settings))))
    value = _at(to_dict(settings), key)
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _toml_lines(settings: Any, above: tuple[str, ...]) -> Iterator[str]:
    # Values come before groups: in TOML a value after a group's head would belong to that group.
    sections = []
    for name, field in _fields(type(settings)).items():
        value = getattr(settings, name)
        if _section_class(field) is not None:
            sections.append((name, value))
            continue
        yield ""
        allowed = "" if field.annotation is str else f" Allowed: {describe_values(field)}."
        yield from _comment(_flowing(field.description or f"{name}.") + allowed)
        yield f"# {name} =" if value is None else f"{name} = {_toml_text(value)}"
    for name, value in sections:
        keys = (*above, name)
        summary = (type(value).__doc__ or "").strip().partition("\n\n")[0]
        yield ""
        yield from _comment(_flowing(summary))
        yield f"[{'.'.join(keys)}]"
        yield from _toml_lines(value, keys)


def _toml_text(value: Any) -> str:
    import tomli_w

    plain = list(value) if isinstance(value, tuple) else value
    text = tomli_w.dumps({"value": plain}).strip().removeprefix("value = ")
    # Lists are written over several lines; those of settings are short.
    return " ".join(text.split()).replace("[ ", "[").replace(", ]", "]") if isinstance(plain, list) else text


def _flowing(text: str) -> str:
    return " ".join(text.replace("``", "").split())


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _COMMENT_WIDTH, break_long_words=False):
        yield f"# {line}"


#: Marks a setting that changes where or how fast a model answers, not what: ``Annotated[int, RUNTIME_ONLY]``.
RUNTIME_ONLY = "runtime only"


def gate_settings(settings: Any) -> dict[str, Any]:
    """Settings that a trained gate depends on besides model and prompt, by dotted key.

    These are ``fusion`` and the section of the chosen model in ``models``, without those marked :data:`RUNTIME_ONLY`.
    """
    sections = {"fusion": settings.fusion}
    if hasattr(settings.models, settings.model):
        sections[f"models.{settings.model}"] = getattr(settings.models, settings.model)
    found = {}
    for name, section in sections.items():
        values = to_dict(section)
        for key, info in known_fields(type(section)).items():
            if RUNTIME_ONLY not in info.metadata:
                found[f"{name}.{key}"] = _at(values, key)
    return found
