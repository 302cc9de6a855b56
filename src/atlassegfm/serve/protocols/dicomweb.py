"""DICOM series of the cases, as DICOMweb gives them to viewers such as OHIF: QIDO-RS lists, WADO-RS headers and pixels.

Nothing can be written. Of a series there are the slices that form the scan, without localisers and other volumes of a
4-D series: the viewer shows the voxels of the result. Pixels are decoded here, whatever they are compressed as.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from ...dicom import Series
from ...dicom.files import decode_pixels, element_errors, read_dataset, read_header
from .catalogue import Catalogue

if TYPE_CHECKING:
    from pydicom import Dataset

#: What lists say of a study, and of a series.
_STUDY = (
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyDescription", "StudyInstanceUID", "StudyID"),
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
)
_SERIES = ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDate", "SeriesTime", "SeriesDescription")
#: Parameters of a search that choose nothing.
_NO_FILTERS = frozenset({"limit", "offset", "includefield", "fuzzymatching"})
#: Pixels are sent as explicit VR, little endian; elements of a header above this many bytes are left out.
_SYNTAX, _MOST_ELEMENT_BYTES = "1.2.840.10008.1.2.1", 4096
_decoding = Lock()


def router_of(catalogue: Catalogue) -> APIRouter:
    """Make the routes of the protocol."""
    router = APIRouter(prefix="/dicom-web")

    @router.get("/studies")
    def studies(request: Request, limit: int = 1000, offset: int = 0) -> Response:
        """List the studies that a search is for."""
        by_study: dict[str, list[Series]] = {}
        for one in catalogue.series():
            by_study.setdefault(one.study_uid, []).append(one)
        rows = map(_study, by_study.values())
        wanted = {key: text for key, text in request.query_params.items() if text and key not in _NO_FILTERS}
        return _json([_elements(row) for row in rows if _fits(row, wanted)][offset : offset + limit])

    @router.get("/studies/{study}/series")
    def series(study: str) -> Response:
        """List the series of a study."""
        found = [one for one in catalogue.series() if one.study_uid == study]
        return _json([_elements(_listed(one, _SERIES)) for one in found])

    @router.get("/studies/{study}/series/{uid}/metadata")
    def metadata(study: str, uid: str) -> Response:
        """Send the headers of the slices of a series."""
        paths = dict.fromkeys(one.path for one in _find(catalogue, study, uid).frames)
        return _json([_header(path) for path in paths])

    @router.get("/studies/{study}/series/{uid}/instances/{instance}/frames/{number}")
    def pixels(study: str, uid: str, instance: str, number: int) -> Response:
        """Send the pixels of a slice, stored values that are not rescaled."""
        for one in _find(catalogue, study, uid).frames:
            if (one.uid, one.number) == (instance, number - 1):
                return _multipart(_pixels(one.path)[one.number])
        raise HTTPException(404, "no such image")

    return router


def _find(catalogue: Catalogue, study: str, uid: str) -> Series:
    for one in catalogue.series():
        if (one.study_uid, one.uid) == (study, uid):
            return one
    raise HTTPException(404, "no such series")


def _listed(series: Series, keywords: Sequence[str]) -> Dataset:
    """Elements of a series' header, by keyword."""
    from pydicom import Dataset

    found, header = Dataset(), series.header()
    for keyword in keywords:
        if keyword in header:
            found[keyword] = header[keyword]
    found.NumberOfSeriesRelatedInstances = len({one.uid for one in series.frames})
    return found


def _study(series: Sequence[Series]) -> Dataset:
    found = _listed(series[0], _STUDY)
    found.ModalitiesInStudy = sorted({one.modality for one in series})
    found.NumberOfStudyRelatedSeries = len(series)
    found.NumberOfStudyRelatedInstances = sum(len({frame.uid for frame in one.frames}) for one in series)
    del found.NumberOfSeriesRelatedInstances
    return found


def _fits(row: Dataset, wanted: Mapping[str, str]) -> bool:
    """Check whether a study has all values that are searched for, with wildcards or in a range; 400 for no element."""
    from pydicom.tag import Tag

    for key, text in wanted.items():
        try:
            element = row.get(Tag(key))
        except ValueError:
            raise HTTPException(400, f"no element of DICOM is called {key[:64]}") from None
        found = str(getattr(element, "value", "")).lower()
        first, dash, last = text.lower().partition("-")
        in_range = key.endswith("Date") and bool(dash) and first <= found <= (last or found)
        if not in_range and not fnmatchcase(found, text.lower()):
            return False
    return True


def _header(path: Path) -> dict[str, Any]:
    header = read_header(path)
    header.remove_private_tags()
    return _elements(header)


def _elements(dataset: Dataset) -> dict[str, Any]:
    """Elements in DICOM's model of JSON; those that are not valid are left out."""
    with element_errors(Path("DICOM")):
        found: dict[str, Any] = dataset.to_json_dict(_MOST_ELEMENT_BYTES, lambda _: "", suppress_invalid_tags=True)
    return found


@lru_cache(maxsize=2)
def _decoded(path: Path, _stamp: int) -> NDArray[Any]:
    return decode_pixels(read_dataset(path), path)


def _pixels(path: Path) -> NDArray[Any]:
    """(frames, rows, columns) stored values of a file; one with many frames is decoded once."""
    with _decoding:
        return _decoded(path, path.stat().st_mtime_ns)


def _json(rows: list[dict[str, Any]]) -> Response:
    return Response(json.dumps(rows, allow_nan=False), media_type="application/dicom+json")


def _multipart(pixels: NDArray[Any]) -> Response:
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: application/octet-stream; transfer-syntax={_SYNTAX}\r\n\r\n"
    body = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()
    kind = f'multipart/related; type="application/octet-stream"; boundary={boundary}'
    return Response(b"".join((head.encode(), body, f"\r\n--{boundary}--\r\n".encode())), media_type=kind)
