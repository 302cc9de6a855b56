"""How options are declared: the fields of a frozen dataclass, of which a command is made."""

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, TypeVar

import typer

from .help import Command

O = TypeVar("O")  # noqa: E741

options = dataclass(frozen=True, kw_only=True)


def option(usage: str, text: str, default: Any = None, **more: Any) -> Any:
    """Make a field of an option from its names and its value as the help shows them, such as "--out -o OUT"."""
    words = usage.split()
    metavar = None if words[-1].startswith("-") else words.pop()
    info = typer.Option(*words, metavar=metavar, help=text, **more)
    return field(default=default, metadata={"as": info})


required = functools.partial(option, default=MISSING)
flag = functools.partial(option, default=False)


def argument(metavar: str, text: str, default: Any = MISSING) -> Any:
    """Make a field of an argument."""
    return field(default=default, metadata={"as": typer.Argument(metavar=metavar, help=text)})


names_option = functools.partial(option, "--names FILE", "Names of the labels: JSON, or '1 liver' lines.")
series_option = functools.partial(
    option,
    "--series S",
    "Which series of a DICOM folder: its number, UID or part of its description; '#2' behind it: the second volume of "
    "a 4-D series.",
)


def command(app: typer.Typer, name: str) -> Callable[[Callable[[O], None]], Callable[[O], None]]:
    """Register a function of one options object as a command; its help is the function's docstring."""

    def register(function: Callable[[O], None]) -> Callable[[O], None]:
        options_class = typing.get_type_hints(function)["options"]
        hints = typing.get_type_hints(options_class)

        def call(**values: Any) -> None:
            function(options_class(**values))

        parameters = []
        # Fields without a default first: they are what a command is about.
        for one in sorted(fields(options_class), key=lambda one: one.default is not MISSING):
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            kind, hint = inspect.Parameter.KEYWORD_ONLY, Annotated[hints[one.name], one.metadata["as"]]
            parameters.append(inspect.Parameter(one.name, kind, default=default, annotation=hint))
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        call.__doc__ = function.__doc__
        app.command(name, cls=Command)(call)
        return function

    return register
