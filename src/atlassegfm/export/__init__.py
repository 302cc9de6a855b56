"""Results for other programs: a training set of nnU-Net, derivatives of a BIDS dataset."""

from .bids import Derivatives, write_bids
from .nnunet import TrainingSet, write_nnunet
from .results import Found, Result, find_results

__all__ = ["Derivatives", "Found", "Result", "TrainingSet", "find_results", "write_bids", "write_nnunet"]
