"""Identity of DICOM objects: does one belong to a series, and which names and UIDs do new ones get.

Identifiers are compared and copied; messages and logs never contain them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.labels import Structure
from ..core.version import __version__
from .files import text_of
from .series import Series

if TYPE_CHECKING:
    from pydicom import Dataset

SOFTWARE = "AtlasSegFM"
#: Longest values of the types LO and ST, characters.
LONGEST_NAME, LONGEST_TEXT = 64, 1024
#: Elements of patient and study that every object must have, if only empty (types 1 and 2) ...
_COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)
#: ... and those it has where the series has them.
_COPIED_IF_THERE = (
    *("IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyDescription"),
)


@dataclass(frozen=True)
class Provenance:
    """How new objects were made. Equal provenance, series and labels give equal objects and UIDs."""

    model: str  # name of the segmentation model
    summary: str = ""  # of the whole result, for the description of the object
    descriptions: Mapping[int, str] = field(default_factory=dict)  # verdict of each structure by its label value
    when: datetime | None = None  # time of creation; left out of the objects if None
    version: str = __version__  # of this program

    @property
    def text(self) -> str:
        """One line, of at most 1024 characters."""
        parts = [f"{SOFTWARE} {self.version}", f"model {self.model}", self.summary, "automatic, not approved"]
        return "; ".join(part for part in parts if part)[:LONGEST_TEXT]

    @property
    def date(self) -> str:
        """As DICOM writes it; empty if not known."""
        return "" if self.when is None else self.when.strftime("%Y%m%d")

    @property
    def time(self) -> str:
        """As DICOM writes it; empty if not known."""
        return "" if self.when is None else self.when.strftime("%H%M%S")

    def describe(self, value: int, maker: str) -> str:
        """Describe one structure: its verdict, and who made it."""
        return f"{self.descriptions.get(value, '')}; {maker}".removeprefix("; ")[:LONGEST_TEXT]


def new_uid(*parts: str | bytes) -> str:
    """Make a UID that depends on its parts alone."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return f"2.25.{uuid.UUID(bytes=digest.digest()[:16], version=5).int}"  # the root of UUIDs: DICOM part 5, B.2


def fingerprint(series: Series, structures: Sequence[Structure], provenance: Provenance, data: NDArray[Any]) -> bytes:
    """Hash what distinguishes one result: series, structures and their voxels, (I, J, K), and provenance."""
    digest = hashlib.sha256()
    texts = (series.uid, repr(structures), provenance.text, repr(sorted(provenance.descriptions.items())))
    for text in (*texts, provenance.date + provenance.time, str(data.shape)):
        digest.update(text.encode() + b"\0")
    for k in range(data.shape[2]):
        digest.update(data[..., k].T.tobytes())
    return digest.digest()


def series_number(series: Series, offset: int) -> int:
    """Make the number of a new series from that of another: 3 gives 301, 302, ..."""
    try:
        number = int(float(series.number))
    except ValueError:
        number = 10
    return (number if 0 < number < 10_000 else 10) * 100 + offset


def dataset_of(**elements: Any) -> Dataset:
    """Make a dataset of some elements."""
    import pydicom

    dataset = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def copy_identity(series: Series, to: Dataset) -> None:
    """Copy patient, study and frame of reference of a series, with new UIDs where it has none; text becomes UTF-8."""
    header = series.header()
    to.SpecificCharacterSet = "ISO_IR 192"
    for keyword in (*_COPIED, *_COPIED_IF_THERE):
        value = text_of(header, keyword)
        if value or keyword in _COPIED:
            setattr(to, keyword, value)
    to.StudyInstanceUID = series.study_uid or new_uid("study", series.uid)
    to.FrameOfReferenceUID = series.frame_uid or new_uid("frame of reference", series.uid)


def check_belongs(
    path: Path,
    series: Series,
    *,
    patient_id: str,
    frame_uids: Iterable[str],
    series_uids: Iterable[str],
    instance_uids: Iterable[str] = (),
) -> list[str]:
    """Check that structures were drawn on a series, or at least in its frame of reference, and give warnings.

    UIDs are those of the frames of reference, series and images that the structures refer to; unknown ones are empty.
    InputError if they are of another patient or in another frame of reference.
    """
    frames, others = set(frame_uids) - {""}, set(series_uids) - {""}

    def refusal(how: str) -> InputError:
        return InputError(f"{path}: {how} than the scan in {series.folder}; give the series it was drawn on")

    if patient_id and series.patient_id and patient_id != series.patient_id:
        raise refusal("has another patient ID")
    if frames and series.frame_uid and series.frame_uid not in frames:
        raise refusal("lies in another frame of reference")
    if series.uid in others or set(instance_uids) & {frame.uid for frame in series.frames}:
        return []
    if frames and series.frame_uid:
        return ["was drawn on another series in the same frame of reference"] if others else []
    if others:
        raise refusal("was drawn on another series, of no known frame of reference,")
    return ["it does not say which scan it belongs to: that is not checked"]
