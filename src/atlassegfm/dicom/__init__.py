"""DICOM: series as scans, RTSTRUCT and DICOM-SEG as label maps, in and out.

The LPS frame of DICOM is turned to RAS+ here and nowhere else. Needs the extra ``dicom``; without it this package can
be imported, and says so when it is used.
"""

from __future__ import annotations

from .files import require_dicom_extra
from .identity import Provenance
from .masks import EVERYTHING, OVERLAPS, Overlap, Selection, read_synonyms, structures_in
from .opening import is_dicom_input, open_image, open_labels
from .roundtrip import RoundTrip, check_round_trip
from .rtstruct import read_rtstruct, write_rtstruct
from .seg import read_segmentation, write_segmentation
from .series import DicomSource, Series, find_series, is_series_folder, load_series, series_of

__all__ = [
    "EVERYTHING",
    "OVERLAPS",
    "DicomSource",
    "Overlap",
    "Provenance",
    "RoundTrip",
    "Selection",
    "Series",
    "check_round_trip",
    "find_series",
    "is_dicom_input",
    "is_series_folder",
    "load_series",
    "open_image",
    "open_labels",
    "read_rtstruct",
    "read_segmentation",
    "read_synonyms",
    "require_dicom_extra",
    "series_of",
    "structures_in",
    "write_rtstruct",
    "write_segmentation",
]
