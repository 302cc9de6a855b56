"""DICOM: read series as scans, RTSTRUCT and DICOM-SEG as label maps, and write results as both.

LPS of DICOM becomes RAS+ mm here and nowhere else. Without the extra ``dicom``, reading raises MissingExtraError.
"""

from .files import is_dicom, require_dicom_extra
from .identity import Provenance
from .opening import is_dicom_input, modalities_in, open_image, open_labels
from .roundtrip import check_round_trip
from .rtstruct import contours_in, read_rtstruct, write_rtstruct
from .seg import read_segmentation, write_segmentation
from .series import MODALITIES as SCAN_MODALITIES
from .series import DicomSource, Series, find_series, is_series_folder, load_series, series_of
from .structures import EVERYTHING, OVERLAPS, Overlap, Selection, read_synonyms, structures_in, with_structures

__all__ = ["EVERYTHING", "OVERLAPS", "SCAN_MODALITIES", "DicomSource", "Overlap", "Provenance", "Selection", "Series"]
__all__ += ["find_series", "is_dicom", "is_dicom_input", "is_series_folder", "load_series", "modalities_in"]
__all__ += ["contours_in", "open_image", "open_labels", "read_rtstruct", "read_segmentation", "read_synonyms"]
__all__ += ["check_round_trip", "require_dicom_extra", "series_of", "structures_in", "with_structures"]
__all__ += ["write_rtstruct", "write_segmentation"]
