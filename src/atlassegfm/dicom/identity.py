"""Whether a DICOM object belongs to a series, and what new objects on it are called.

Identifiers are compared and copied; messages and logs do not hold them.
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
#: Of the patient and study modules: what every object of a study must have, if only empty (types 1 and 2), and ...
_COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)
#: ... what it has where the series has it.
_COPIED_IF_THERE = (
    *("IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyDescription", "PositionReferenceIndicator"),
)
#: Of ST.
_LONGEST_TEXT = 1024
#: UIDs made of a UUID begin so (DICOM part 5, B.2).
_UUID_ROOT = "2.25."


@dataclass(frozen=True)
class Provenance:
    """What new objects say about how they were made.

    Parameters
    ----------
    model : str
        Name of the segmentation model.
    summary : str
        On the whole result, for the description of the object.
    descriptions : mapping of int to str
        On each structure by its label value: its verdict.
    when : datetime, optional
        Time of creation; the objects have none if it is left out. The same time, series and labels give the same
        object, UIDs included.
    version : str
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
        return "; ".join(part for part in parts if part)[:_LONGEST_TEXT]

    @property
    def date(self) -> str:
        """As DICOM writes it; empty if not known."""
        return "" if self.when is None else self.when.strftime("%Y%m%d")

    @property
    def time(self) -> str:
        """As DICOM writes it; empty if not known."""
        return "" if self.when is None else self.when.strftime("%H%M%S")


def new_uid(*parts: str | bytes) -> str:
    """A UID that is a function of its parts: equal parts give the same, others (practically) never do."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return _UUID_ROOT + str(uuid.UUID(bytes=digest.digest()[:16], version=5).int)


def fingerprint(series: Series, structures: Sequence[Structure], provenance: Provenance, data: NDArray[Any]) -> bytes:
    """What makes one result another: the series, the structures and their voxels, and what is said about them."""
    digest = hashlib.sha256()
    said = (series.uid, repr(structures), provenance.text, repr(sorted(provenance.descriptions.items())))
    for text in (*said, provenance.date + provenance.time, str(data.shape)):
        digest.update(text.encode() + b"\0")
    for k in range(data.shape[2]):
        digest.update(data[..., k].T.tobytes())
    return digest.digest()


def series_number(series: Series, offset: int) -> int:
    """A number for a new series beside the one it was made on: 3 gives 301, 302, ..."""
    try:
        number = int(float(series.number))
    except ValueError:
        number = 10
    return (number if 0 < number < 10_000 else 10) * 100 + offset


def frame_of(series: Series) -> str:
    """The frame of reference of a series; a new one where its files name none, as new objects must have one."""
    return series.frame_uid or new_uid("frame of reference", series.uid)


def study_of(series: Series) -> str:
    """The study of a series; a new one where its files name none, as new objects must have one."""
    return series.study_uid or new_uid("study", series.uid)


def copy_identity(series: Series, to: Dataset) -> None:
    """Copy patient, study and frame of reference of a series; the text becomes UTF-8."""
    header = series.header()
    to.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _COPIED:
        setattr(to, keyword, text_of(header, keyword))
    for keyword in _COPIED_IF_THERE:
        if text_of(header, keyword):
            setattr(to, keyword, text_of(header, keyword))
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
) -> tuple[str, ...]:
    """Check that structures were drawn on a series, or at least in its space.

    Parameters
    ----------
    path : Path
        Of the structures.
    series : Series
        The scan.
    patient_id : str
        Of the structures; empty where unknown.
    frame_uids, series_uids, instance_uids : iterable of str
        What they refer to: frames of reference, series, images.

    Returns
    -------
    tuple of str
        Notes for the user.

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
    if series.uid in others:
        return ()
    if set(instance_uids) & {frame.uid for frame in series.frames}:
        return ()
    if not frames or not series.frame_uid:
        if others:
            raise InputError(
                f"{path}: was drawn on another series than that in {series.folder}, and nothing says that both lie in "
                "one space; give the series they were drawn on"
            )
        return ("it does not say which scan it belongs to: that is not checked",)
    if others:
        return ("was drawn on another series in the same frame of reference",)
    return ()
