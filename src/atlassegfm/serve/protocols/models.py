"""Models behind prompts: those of the session where they take the kind of prompt, else the built-in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

from ...context import Context
from ...core.version import __version__
from ...models import Segmenter, load_model
from ...models.table import describe_models, weights_paths
from ...prompts import PromptKind
from ...settings import Settings
from ..app import Desk


@dataclass
class Models:
    """Models of a session: of the context, or of ``--model``; the built-in one alone where results are reviewed."""

    desk: Desk
    _loaded: dict[PromptKind, Segmenter] | None = None
    _lock: Lock = field(default_factory=Lock)

    def by_prompt(self) -> Mapping[PromptKind, Segmenter]:
        """Load the models once, and give the first that takes each kind of prompt, others than the built-in one.

        Errors as of :func:`.load_model`.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def licence(self) -> str:
        """Name the models and the licences of their weights, for users to read."""
        settings = self._settings()
        rows = () if settings is None else describe_models(settings)
        said = [f"{row.name} ({row.weights_licence})" for row in rows if row.weights is not None]
        return f"Apache-2.0 (AtlasSegFM {__version__}, {', '.join([*said, 'built-in model'])})"

    def _settings(self) -> Settings | None:
        cohort = self.desk.cohort
        return None if cohort is None else cohort.job.change(Context.load(cohort.job.context).settings)

    def _load(self) -> dict[PromptKind, Segmenter]:
        settings, found = self._settings(), dict[PromptKind, Segmenter]()
        if settings is None or self.desk.cohort is None:
            return found
        paths = weights_paths(settings)
        for row in describe_models(settings):
            if row.weights is not None:
                model = load_model(row.name, self.desk.cohort.job.device, settings.models, paths.get(row.name))
                for kind in row.prompts:
                    found.setdefault(kind, model)
        return found
