"""Segmentation models behind one interface.

A model is one row of :data:`MODELS` and one file of this package. It encodes a scan once, then predicts its structures
from a prompt each. :data:`BASELINES` are networks of ``benchmark icl``, which take no prompts. Importing this package
does not load torch.
"""

from .base import ModelDescription, OnPrompt, Segmenter
from .incontext import BASELINES
from .table import (
    MODELS,
    accept_licence,
    describe_model,
    describe_published,
    fetch_weights,
    licence_accepted,
    load_model,
)

__all__ = ["BASELINES", "MODELS", "ModelDescription", "OnPrompt", "Segmenter"]
__all__ += ["accept_licence", "describe_model", "describe_published", "fetch_weights", "licence_accepted", "load_model"]
