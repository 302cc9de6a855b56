"""The model and the prompt that the settings name."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import InputError
from ..prompts import PromptKind
from ..settings import NO_MODEL, Settings
from .base import Segmenter
from .table import describe_model, load_model


def load_chosen(settings: Settings, device: str) -> Segmenter | None:
    """Load the model of the settings onto "cpu" or "cuda"; None without a model. Errors as of :func:`load_model`."""
    if settings.model == NO_MODEL:
        return None
    path = Path(settings.model_path).expanduser() if settings.model_path else None
    return load_model(settings.model, device, settings.models, path)


def prompt_kind(settings: Settings) -> PromptKind | None:
    """Choose the kind of prompt; None without a model. InputError if the model does not take the one that is set."""
    if settings.model == NO_MODEL:
        return None
    row = describe_model(settings.model)
    if settings.prompt == "auto":
        return row.prompts[0]
    if row.prompts == ("region",):
        raise InputError(f"the model {row.name!r} takes no prompt; leave the prompt at 'auto'")
    if settings.prompt not in row.prompts:
        raise InputError(
            f"the model {row.name!r} does not take the prompt {settings.prompt!r}; it takes {', '.join(row.prompts)}"
        )
    return settings.prompt
