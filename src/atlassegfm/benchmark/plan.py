"""Plan of a benchmark: variants, pairs, structures and tolerances."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.config import to_dict
from ..core.dataset import Dataset
from ..core.version import __version__, library_versions
from ..evaluate.tolerances import Tolerances
from ..models.incontext import Baseline
from ..settings import NO_MODEL, Settings
from .protocols import Pair
from .records import PlanRecord

#: Scored of each pair, and each of several models by its name, their mixture then being the model. "paper": the paper's
#: gate on the same masks as the default one. "oracle": a perfect gate.
METHODS = ("atlas", "model", "paper", "fused", "oracle")
#: Scored of an in-context baseline, which has nothing else.
IN_CONTEXT = "in context"
#: ``TREES`` are the scans of ``benchmark vessels``.
PLAN, PAIRS, TREES = "plan.json", "pairs", "trees"
#: Files of a benchmark's folder; one with any other is not touched.
OUTPUTS = frozenset(
    {PLAN, PAIRS, TREES, "results.csv", "times.csv", "summary.json", "report.md", "dice.png", "dice-time.png"}
)


@dataclass(frozen=True)
class Variant:
    """One way of doing the job, a column of the benchmark."""

    name: str
    settings: Settings
    #: "user": the model alone, with one click into the middle of the true structure.
    prompts_from: Literal["atlas", "user"] = "atlas"
    methods: tuple[str, ...] | None = None  # which of those scored tables show; None for all
    atlases: int | None = None  # of each pair's so many, the first ones; None for all
    baseline: Baseline | None = None  # an in-context network instead of the method, from one atlas

    @property
    def weighted(self) -> tuple[str, ...]:
        """Models, or the baseline, whose published weights are used where they have any."""
        if self.baseline is not None:
            return () if self.baseline.random_weights else (self.baseline.name,)
        return self.settings.model_names

    @property
    def scored(self) -> tuple[str, ...]:
        """Methods that this variant has; "paper" only where its gate does more than the paper's."""
        if self.baseline is not None:
            return (IN_CONTEXT,)
        if self.prompts_from == "user":
            return ("model",)
        if self.settings.model == NO_MODEL:
            return ("atlas",)
        members = self.settings.model_names if len(self.settings.model_names) > 1 else ()
        methods = (METHODS[0], *members, *METHODS[1:])
        return tuple(method for method in methods if method != "paper" or self.settings.fusion.gate == "default")


@dataclass(frozen=True)
class Plan:
    """All that decides the scores of a benchmark."""

    title: str  # a few words, such as "all-pairs"
    dataset: Dataset  # with the cases that take part
    pairs: tuple[Pair, ...]  # in the order they are run
    #: Run one after the other on each pair, beginning with another one each time, so that their times compare.
    variants: tuple[Variant, ...]
    values: tuple[int, ...]  # label values that take part: the others are removed from the atlas and not scored
    tolerances: Tolerances  # of the NSD
    centreline: tuple[int, ...] = ()  # label values to score by clDice too
    seed: int = 0  # of the protocol and the bootstrap
    device: str = "cpu"  # or "cuda"
    command: str = ""  # command line, for the report

    @property
    def names(self) -> dict[int, str]:
        """Structure name of each label value that takes part."""
        return {value: self.dataset.structures[value] for value in self.values}

    def files(self, pair: Pair) -> tuple[Path, ...]:
        """Images and labels of atlases and query."""
        cases = [self.dataset.case(name) for name in (pair.atlas, *pair.others, pair.query)]
        return tuple(path for case in cases for path in (case.image, case.labels))

    def record(self) -> PlanRecord:
        """Describe what must be the same for a run to continue."""
        import torch

        return PlanRecord(
            dataset=self.dataset.name,
            structures={str(value): name for value, name in self.names.items()},
            tolerances_mm={name: self.tolerances.of(value, name) for value, name in self.names.items()},
            centreline=self.centreline,
            variants={
                one.name: {
                    "prompts_from": one.prompts_from,
                    "atlases": one.atlases,
                    "settings": to_dict(one.settings),
                }
                | ({} if one.baseline is None else {"baseline": one.baseline.to_dict()})
                for one in self.variants
            },
            device=self.device,
            threads=torch.get_num_threads(),
            version=__version__,
            versions=library_versions(),
        )


def slug(name: str) -> str:
    """Turn a name into one part of a path."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-") or "variant"
