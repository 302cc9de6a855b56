"""Help texts and usage errors: arguments as they are typed, whole sentences, and what a misspelt word may mean."""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ..core.text import did_you_mean
from .session import sentence

HELP_OPTIONS = ("-h", "--help")


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


class Command(TyperCommand):
    """A command whose help shows arguments by their metavar alone."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Give the words of the usage line."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *map(_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for one in self.get_params(ctx):
            if (record := one.get_help_record(ctx)) is None:
                continue
            if one.param_type_name == "argument":
                sections["Arguments"].append((_argument(one), record[1]))
            else:
                sections["Options"].append((re.sub(r"<\w+>", "TEXT", record[0]), record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """Subcommands, listed with the whole first sentence of their help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the subcommand; a usage error says which may be meant."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the subcommands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in self.commands.items()])


def usage_error(error: Any) -> str:
    """Say in one line what is wrong with a call, and where the help is."""
    text = sentence(error.format_message()).removesuffix(".")
    if (possibilities := getattr(error, "possibilities", None)) is not None:
        text = sentence(error.message) + did_you_mean(error.option_name, possibilities)
    context = getattr(error, "ctx", None)
    return text if context is None else f"{text}; see {context.command_path} -h"
