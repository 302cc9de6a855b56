"""Geometry, labels and intensities of files, before they are used; which scan to contour."""

from .files import check_files
from .findings import Check, Finding

__all__ = ["Check", "Finding", "check_files"]
