"""Maps from the fixed (query) to the moving (atlas) world, and sampling through them."""

from .maps import Affine, Chain, DisplacementField, Transform
from .resample import resample

__all__ = ["Affine", "Chain", "DisplacementField", "Transform", "resample"]
