"""Models behind prompts of nnInteractive's clients: those of the session, and the built-in one for what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

from ...context import Context
from ...core.version import __version__
from ...models import Segmenter, load_model
from ...models.table import describe_models, weights_paths
from ...prompts import PromptKind
from ...settings import Settings
from ..app import Desk


class Chosen(NamedTuple):
    """Models that answer first prompts: by the kind that each takes, and those that are shown what these found."""

    by_prompt: Mapping[PromptKind, Segmenter] = MappingProxyType({})
    followers: Sequence[Segmenter] = ()


@dataclass
class Models:
    """Models of a session, of the context or of ``--model``; the built-in one alone where results are reviewed."""

    desk: Desk
    _chosen: Chosen | None = None
    _lock: Lock = field(default_factory=Lock)

    def chosen(self) -> Chosen:
        """Load the models of the session, others than the built-in one, once; errors as of :func:`.load_model`."""
        with self._lock:
            if self._chosen is None:
                self._chosen = self._load()
            return self._chosen

    def licence(self) -> str:
        """Name the models and the licences of their weights, for users to read."""
        settings = self._settings()
        rows = () if settings is None else describe_models(settings)
        said = [f"{row.name} ({row.weights_licence})" for row in rows if row.weights is not None]
        return f"Apache-2.0 (AtlasSegFM {__version__}, {', '.join([*said, 'built-in model'])})"

    def _settings(self) -> Settings | None:
        cohort = self.desk.cohort
        return None if cohort is None else cohort.job.change(Context.load(cohort.job.context).settings)

    def _load(self) -> Chosen:
        settings = self._settings()
        if settings is None or self.desk.cohort is None:
            return Chosen()
        by_prompt, followers = dict[PromptKind, Segmenter](), list[Segmenter]()
        paths, device = weights_paths(settings), self.desk.cohort.job.device
        for row in describe_models(settings):
            if row.weights is None:
                continue
            model = load_model(row.name, device, settings.models, paths.get(row.name))
            if row.follows:
                followers.append(model)
            for kind in () if row.follows else row.prompts:
                by_prompt.setdefault(kind, model)
        return Chosen(by_prompt, followers)
