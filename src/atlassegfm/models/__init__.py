"""Segmentation models behind one interface.

A model is one row of :data:`MODELS` and one file of this package. It encodes a scan once, then predicts its structures
from a prompt each. Importing this package does not load torch.
"""

from .base import ModelDescription, OnPrompt, Segmenter
from .table import MODELS, accept_licence, describe_model, fetch_weights, licence_accepted, load_model

__all__ = ["MODELS", "ModelDescription", "OnPrompt", "Segmenter"]
__all__ += ["accept_licence", "describe_model", "fetch_weights", "licence_accepted", "load_model"]
