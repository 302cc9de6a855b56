"""Reading, changing and printing settings.

Settings are frozen dataclasses, checked by pydantic, that may hold others: ``Settings.registration.affine`` is the key
``registration.affine``. A key is written in two places, its field and the line that reads it.
"""

import dataclasses
import difflib
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .errors import InputError
from .files import PathLike
from .labels import listed
from .text import did_you_mean

S = TypeVar("S")

#: Nested keys and values, as TOML has them.
Table = Mapping[str, Any]

#: Comments in printed settings are wrapped to this width.
_COMMENT_WIDTH = 100
#: Known keys listed for an unknown one.
_CLOSEST = 5
#: Marks a setting that changes where or how fast a model answers, not what: ``Annotated[int, RUNTIME_ONLY]``.
RUNTIME_ONLY = "runtime only"

#: Marks a setting of the registration that estimates of quality do not depend on.
QUALITY_NEUTRAL = "quality neutral"


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested dictionaries of plain values, None among them."""
    return dict(TypeAdapter(type(settings)).dump_python(settings, mode="json"))


def with_overrides(settings: S, assignments: Sequence[str], *, option: str = "--set") -> S:
    """Replace single values of settings, as the command line gives them.

    Each assignment is ``key=value``: the key is dotted, the value is written as in TOML (quotes may be left out).
    ``option`` is what the user typed before them, for messages. InputError if an assignment has no "=", its key is not
    known or its value not allowed.
    """
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            example = next(iter(known_fields(type(settings))))
            raise InputError(
                f"{option} {assignment}: expected key=value, such as {example}={_at(to_dict(settings), example)}"
            )
        table = toml_value(text)
        for name in reversed(key.split(".")):
            table = {name: table}
        settings = with_table(settings, table, origin=f"{option} {assignment}")
    return settings


def with_file(settings: S, path: PathLike) -> S:
    """Replace the values of settings that a TOML file has; errors as of :func:`load_toml` and :func:`with_table`."""
    return with_table(settings, load_toml(path), origin=str(path))


def with_table(settings: S, table: Table, *, origin: str) -> S:
    """Replace the values of settings that a nested table has; InputError if a key is unknown or a value not allowed.

    ``origin``, where the table comes from, begins the message.
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
        value = _at(merged, key)
        choices = _choices(fields[key].annotation) if key in fields else ()
        expected += did_you_mean(value, choices) if isinstance(value, str) else ""
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise InputError(f"{origin}: {key} is {shown}; expected {expected.removeprefix('expected ')}") from None


def load_toml(path: PathLike, what: str = "a settings file") -> dict[str, Any]:
    """Read a TOML file; InputError if it is missing, unreadable or not TOML. ``what`` it should be is for messages."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors begin with a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what} in TOML") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected {what} in TOML") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); expected {what} in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}; expected {what}: correct it") from None


def to_toml(settings: Any) -> str:
    """Settings as a TOML file, each value below the comment that explains it."""
    return "\n".join(_toml_lines(settings, ())).strip() + "\n"


def known_fields(settings_class: type) -> dict[str, FieldInfo]:
    """Every setting by its dotted key, in the order of the fields."""
    found = {}
    for name, field in _fields(settings_class).items():
        section = _section_class(field)
        inside = {name: field} if section is None else known_fields(section)
        found.update({key if section is None else f"{name}.{key}": inner for key, inner in inside.items()})
    return found


def describe_values(field: FieldInfo) -> str:
    """Describe the values a setting allows: "true or false", "a number from 0 to 1"."""
    return _described(field.annotation, field.metadata)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words a setting allows, where it allows words."""
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(map(str, typing.get_args(annotation)))
    return tuple(word for inner in typing.get_args(annotation) for word in _choices(inner))


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
    return settings_class.__pydantic_fields__  # type: ignore[attr-defined, no-any-return]


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
            some = listed(inside, _CLOSEST)
            raise InputError(f"{origin}: {key} is a group of settings; set one of {some} (`atlassegfm settings`)")
        if inside:
            _check_keys(fields, value, origin, f"{key}.")
        elif key not in fields or isinstance(value, Mapping):
            unknown, part = key, value
            while isinstance(part, Mapping) and part:
                inner, part = next(iter(part.items()))
                unknown += f".{inner}"
            near = _closest(fields, unknown)
            meant = did_you_mean(unknown, near)
            raise InputError(f"{origin}: unknown setting {unknown!r}{meant}; closest settings: {', '.join(near)}")


def _closest(known: Iterable[str], wanted: str) -> list[str]:
    """The known keys most similar to the given one, best first."""

    def similarity(key: str) -> float:
        # A key may be written without its group.
        pairs = ((wanted, key), (wanted.rpartition(".")[2], key.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return sorted(known, key=similarity, reverse=True)[:_CLOSEST]


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


def toml_value(text: str) -> Any:
    """Read the text as a value of TOML; the text itself where it is none, as for words without quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml_lines(settings: Any, above: tuple[str, ...]) -> Iterator[str]:
    # Values come before groups: in TOML a value after a group's head would belong to that group.
    fields = sorted(_fields(type(settings)).items(), key=lambda item: _section_class(item[1]) is not None)
    for name, field in fields:
        value = getattr(settings, name)
        yield ""
        if _section_class(field) is None:
            allowed = "" if field.annotation is str else f" Allowed: {describe_values(field)}."
            yield from _comment(field.description or f"{name}.", allowed)
            yield f"# {name} =" if value is None else f"{name} = {_toml_text(value)}"
        else:
            keys = (*above, name)
            yield from _comment((type(value).__doc__ or "").strip().partition("\n\n")[0])
            yield f"[{'.'.join(keys)}]"
            yield from _toml_lines(value, keys)


def _toml_text(value: Any) -> str:
    import tomli_w

    plain = list(value) if isinstance(value, tuple) else value
    text = tomli_w.dumps({"value": plain}).strip().removeprefix("value = ")
    # Lists are written over several lines; those of settings are short.
    return " ".join(text.split()).replace("[ ", "[").replace(", ]", "]") if isinstance(plain, list) else text


def _comment(text: str, allowed: str = "") -> list[str]:
    flowing = " ".join(text.replace("``", "").split()) + allowed
    return [f"# {line}" for line in textwrap.wrap(flowing, _COMMENT_WIDTH, break_long_words=False)]


def gate_settings(settings: Any) -> dict[str, Any]:
    """Settings that a trained gate depends on besides model and prompt, by dotted key.

    These are ``fusion``, ``tubular`` and the sections of the chosen models in ``models``, without those marked
    :data:`RUNTIME_ONLY`.
    """
    return _without(
        settings, ("fusion.", "tubular", *(f"models.{name}." for name in settings.model_names)), RUNTIME_ONLY
    )


def quality_settings(settings: Any) -> dict[str, Any]:
    """Settings that estimates of quality are calibrated for, by dotted key.

    These are ``registration``, with the section of the chosen engine, without those marked :data:`QUALITY_NEUTRAL`.
    """
    kept = _without(settings, ("registration.",), QUALITY_NEUTRAL)
    engine = f"registration.{settings.registration.engine}."
    return {key: value for key, value in kept.items() if key.count(".") == 1 or key.startswith(engine)}


def _without(settings: Any, groups: tuple[str, ...], mark: str) -> dict[str, Any]:
    """Values by dotted key of the fields in some groups, without those with a mark."""
    values, fields = to_dict(settings), known_fields(type(settings)).items()
    return {key: _at(values, key) for key, field in fields if key.startswith(groups) and mark not in field.metadata}
