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
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)
#: ... and those it has where the series has them.
_COPIED_IF_THERE = (
    *("IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyDescription", "PositionReferenceIndicator"),
)
#: UIDs made from a UUID begin so (DICOM part 5, B.2).
_UUID_ROOT = "2.25."


@dataclass(frozen=True)
class Provenance:
    """How new objects were made.

    Parameters
    ----------
    model
        Name of the segmentation model.
    summary
        Of the whole result, for the description of the object.
    descriptions
        Verdict of each structure by its label value.
    when
        Time of creation; left out of the objects if None. Equal times, series and labels give equal objects and UIDs.
    version
        Of this program.
    """

    model: str
    summary: str = ""
    descriptions: Mapping[int, str] = field(default_factory=dict)
    when: datetime | None = None
    version: str = __version__

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
    return _UUID_ROOT + str(uuid.UUID(bytes=digest.digest()[:16], version=5).int)


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
    """Number a new series made from another: 3 gives 301, 302, ..."""
    try:
        number = int(float(series.number))
    except ValueError:
        number = 10
    return (number if 0 < number < 10_000 else 10) * 100 + offset


def frame_of(series: Series) -> str:
    """Get the frame of reference UID of a series, or a new one, as new objects must have one."""
    return series.frame_uid or new_uid("frame of reference", series.uid)


def study_of(series: Series) -> str:
    """Get the study UID of a series, or a new one, as new objects must have one."""
    return series.study_uid or new_uid("study", series.uid)


def dataset_of(**elements: Any) -> Dataset:
    """Make a dataset of some elements."""
    import pydicom

    dataset = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def copy_identity(series: Series, to: Dataset) -> None:
    """Copy patient, study and frame of reference of a series; the text becomes UTF-8."""
    header = series.header()
    to.SpecificCharacterSet = "ISO_IR 192"
    for keyword in (*_COPIED, *_COPIED_IF_THERE):
        value = text_of(header, keyword)
        if value or keyword in _COPIED:
            setattr(to, keyword, value)
    to.StudyInstanceUID, to.FrameOfReferenceUID = study_of(series), frame_of(series)
    if "PositionReferenceIndicator" not in to:
        to.PositionReferenceIndicator = ""


def check_belongs(
    path: Path,
    series: Series,
    *,
    patient_id: str,
    frame_uids: Iterable[str],
    series_uids: Iterable[str],
    instance_uids: Iterable[str] = (),
) -> list[str]:
    """Check that structures were drawn on a series, or at least in its frame of reference.

    Parameters
    ----------
    patient_id
        Of the structures; empty where unknown.
    frame_uids, series_uids, instance_uids
        Frames of reference, series and images they refer to.

    Returns
    -------
    list of str
        Warnings.

    Raises
    ------
    InputError
        If they are of another patient or in another frame of reference.
    """
    frames, others = set(frame_uids) - {""}, set(series_uids) - {""}
    if patient_id and series.patient_id and patient_id != series.patient_id:
        raise InputError(
            f"{path}: belongs to another patient than the series in {series.folder} (the patient IDs differ); give the "
            "structures that were drawn on it"
        )
    if frames and series.frame_uid and series.frame_uid not in frames:
        raise InputError(
            f"{path}: lies in another frame of reference than the series in {series.folder}, so that its structures "
            "would be misplaced; give the series they were drawn on"
        )
    if series.uid in others or set(instance_uids) & {frame.uid for frame in series.frames}:
        return []
    if frames and series.frame_uid:
        return ["was drawn on another series in the same frame of reference"] if others else []
    if others:
        raise InputError(
            f"{path}: was drawn on another series than that in {series.folder}, and nothing says that both lie in one "
            "frame of reference; give the series they were drawn on"
        )
    return ["it does not say which scan it belongs to: that is not checked"]
