"""Content of run.json, status.json and cohort.json."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .core.record import Record
from .prompts import PromptKind
from .quality.coverage import CUT_FRACTION
from .quality.verdict import Verdict
from .result import Status

#: Raised by hand when results or these files change: results with another number are computed again.
RESULTS_FORMAT = 7
State = Literal["done", "failed", "left"]
SEGMENTATION, RUN, STATUS = "segmentation.nii.gz", "run.json", "status.json"
#: Formats of a segmentation, and the file or folder of each.
FORMATS = {
    "nifti": SEGMENTATION,
    "nrrd": "segmentation.nrrd",
    "seg.nrrd": "segmentation.seg.nrrd",
    "mgz": "segmentation.mgz",
    "masks": "masks",
    "rtstruct": "rtstruct.dcm",
    "seg": "seg.dcm",
}
#: Formats that hold the label map of all structures, the first choice first.
_LABEL_MAPS = ("nifti", "nrrd", "seg.nrrd", "mgz")
#: What people did to the labels, a line each, and the label map as it was before anything was accepted.
EDITS, AUTOMATIC = "edits.jsonl", "automatic.nii.gz"
#: Folder of the label maps as each person accepted them last.
VERSIONS = "versions"
#: Names and colours, for 3D Slicer and ITK-SNAP.
SLICER_COLORS, ITK_SNAP_LABELS = "colors.ctbl", "labels.txt"
#: Files of a result folder: a folder with any other is never replaced.
RESULT_NAMES = frozenset(
    {
        *(*FORMATS.values(), SLICER_COLORS, ITK_SNAP_LABELS, RUN, STATUS, EDITS, AUTOMATIC, VERSIONS),
        *("atlas.nii.gz", "model.nii.gz", "members", "probability.nii.gz", "transform"),
        *("report.html", "overview.png"),
    }
)


def label_map_of(folder: Path) -> Path:
    """Find the label map of a result folder, in whichever format; the path of the NIfTI file if there is none."""
    paths = [folder / FORMATS[name] for name in _LABEL_MAPS]
    return next((path for path in paths if path.is_file()), paths[0])


class FileRecord(Record):
    """One input file, or a folder with all in it."""

    file: str = Field(description="Name, without its folder.")
    place: str = Field(default="", description="Digest of its absolute path, which distinguishes scans of one name.")
    stamp: str = Field(description="Digest of sizes and modification times: compared first, as it is cheap.")
    sha256: str = Field(description="Of the content, first 32 hexadecimal digits.")


class Provenance(Record):
    """What a result was made from. A case is computed again only if one of these differs."""

    version: str
    results_format: int = RESULTS_FORMAT
    settings: str = Field(description="Digest of all settings, device and number of threads.")
    context: str = Field(description="Digest of the atlas: image, labels, structures.")
    context_version: str = Field(description="Version of the program that trained the gate.")
    weights: str | None = Field(description="SHA-256 of the model's weights; null if none are on this machine.")
    keep: bool = Field(description="Whether intermediate results are written; a result with them serves in any case.")
    formats: tuple[str, ...]
    series: str | None = Field(description="Which series of a DICOM folder.")
    query: FileRecord | None = None
    transform: FileRecord | None = Field(default=None, description="The transform given instead of registering.")


class InputRecord(Record):
    """One input of a run by its name."""

    file: str
    notes: tuple[str, ...] = Field(default=(), description="Remarks on its geometry.")


class ContextRecord(Record):
    """The context folder by its name."""

    folder: str
    sha256: str = Field(description="Of its list of checksums.")
    atlassegfm: str = Field(description="Version that made it.")
    files: dict[str, str] = Field(description="Names of the atlas's files, by role.")


class Inputs(Record):
    """Inputs of a run: names only, as folders in clinics name patients."""

    atlas: InputRecord | None = None
    labels: InputRecord | None = None
    query: InputRecord | None = None
    context: ContextRecord | None = None
    transform: InputRecord | None = None


class ModelRecord(Record):
    """The segmentation model."""

    name: str
    summary: str = ""
    code_licence: str = ""
    weights_licence: str = ""
    licence_accepted: str | None = Field(default=None, description="Date (ISO 8601) of accepting the weights' licence.")
    prompt: PromptKind | None = None
    provenance: dict[str, Any] = Field(default_factory=dict, description="Files, versions or server, as reported.")


class RegistrationRecord(Record):
    """The registration of atlas and query; of several atlases that of the nearest one."""

    atlas: int | None = Field(default=None, description="Number of the nearest one of several atlases.")
    atlases: tuple[int, ...] | None = Field(default=None, description="Those of several that were registered in full.")
    source: Literal["fitted", "given"]
    confidence: float | None = Field(description="In [0, 1]; null for a given transform that was not compared.")
    mirrored_gain: float | None = Field(
        default=None,
        description="How much better the query's mirror image fits, in [-1, 1], roughly where it is far behind; "
        "null if not compared.",
    )
    swapped: bool = Field(default=False, description="Whether left and right of the query seem to be swapped.")
    members: int = Field(description="Fits of the deformable stage, averaged.")
    folding: float | None = Field(description="Fraction of the body where the Jacobian determinant is not positive.")
    jacobian: dict[str, float | None] | None
    linear_query_to_atlas_mm: tuple[tuple[float, ...], ...] = Field(description="4 x 4, RAS+ mm.")


class PromptRecord(Record):
    """Prompt of one structure, in voxels of the query as stored and RAS+ mm."""

    kind: PromptKind
    first_voxel: tuple[int, int, int]
    last_voxel: tuple[int, int, int]
    first_mm: tuple[float, float, float]
    last_mm: tuple[float, float, float]


class QualityRecord(Record):
    """Quality estimate of one structure."""

    verdict: Verdict | None
    """Null where it is not judged: with another registration than the default one."""

    reason: str
    estimated_dice: float | None
    low: float | None
    high: float | None
    evidence: dict[str, float | None] | None


class PlaceRecord(Record):
    """Where the structure search found a structure, and the second best place, at least half its size away."""

    shift_mm: float = Field(description="From where the linear stages put it.")
    cost: float = Field(description="Of the match of atlas and scan there; lower is better.")
    second_cost: float | None
    second_distance_mm: float | None = Field(description="Between the two places.")


class RecoveryRecord(Record):
    """A structure taken from the second pass, and what the first pass had found."""

    donor: str = Field(description="Case of the same cohort whose result served as the atlas.")
    status: Status
    verdict: Verdict | None
    estimated_dice: float | None
    volume_ml: float

    @property
    def remark(self) -> str:
        """Where it is from and why, in a clause."""
        found = "" if self.estimated_dice is None else f", estimated Dice {self.estimated_dice:.2f}"
        return f"from the second pass, with case {self.donor} as the atlas (before: {self.verdict}{found})"


class ReviewRecord(Record):
    """A structure that a person accepted, and what was estimated before."""

    by: str = Field(description="Who accepted it, as typed; empty by default.")
    at: str = Field(description="When (ISO 8601, UTC).")
    dice: float | None = Field(description="Of the accepted mask and the automatic one; null where both are empty.")
    status: Status
    reason: str
    quality: QualityRecord | None

    @property
    def remark(self) -> str:
        """Who and when, in a clause."""
        return f"accepted{f' by {self.by}' if self.by else ''} on {self.at[:10]}"


class MemberRecord(Record):
    """One of several models on one structure."""

    weight: float = Field(description="In the mixture that stands for the model, in [0, 1].")
    dice: float | None = Field(description="Of its mask and the result; null where both are empty.")


class StructureRecord(Record):
    """Outcome for one structure."""

    value: int
    name: str
    status: Status
    reason: str
    volume_ml: float
    outside_fraction: float = Field(description="Of the atlas's structure, outside the query's field of view.")
    place: PlaceRecord | None = None
    prompt: PromptRecord | None
    members: dict[str, MemberRecord] | None = Field(default=None, description="Of several models, by name.")
    atlases: tuple[int, ...] | None = Field(default=None, description="Numbers of several atlases that agree on it.")
    quality: QualityRecord | None
    recovered: RecoveryRecord | None = Field(default=None, description="Null where the first pass found it.")
    review: ReviewRecord | None = Field(default=None, description="Null where nobody accepted it.")

    @property
    def of_members(self) -> str:
        """Weight of each of several models, and the Dice of its mask and the result."""
        return ", ".join(
            f"{name} {one.weight:.0%} (Dice {'-' if one.dice is None else f'{one.dice:.2f}'})".replace("%", " %")
            for name, one in (self.members or {}).items()
        )

    @property
    def cut(self) -> str:
        """How the field of view cuts it, as "49 % outside"; empty if it does not."""
        outside = f"{self.outside_fraction:.0%} outside".replace("%", " %")
        return outside if self.outside_fraction >= CUT_FRACTION else ""


class RunRecord(Record):
    """``run.json``: what was done and what came out. The same inputs and settings give the same bytes."""

    format: int = RESULTS_FORMAT
    inputs: Inputs
    device: Literal["cpu", "cuda"]
    seed: int
    model: ModelRecord
    registration: RegistrationRecord
    gate: str | None
    verdict: Verdict | None = Field(description="Worst of the structures; null where none is judged.")
    structures: tuple[StructureRecord, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    dicom: dict[str, Any] | None = Field(default=None, description="Name and comparison when read back, for each file.")
    probability: tuple[str, ...] | None = Field(default=None, description="Structures of probability.nii.gz, in order.")

    @property
    def swapped(self) -> bool:
        """Whether left and right of the query seem to be swapped."""
        return self.registration.swapped

    @property
    def is_judged(self) -> bool:
        """Whether estimates and the bound of the confidence hold."""
        return any(one.quality is not None and one.quality.estimated_dice is not None for one in self.structures)


class SecondPassRecord(Record):
    """What the second pass did for a case: it is tried once."""

    donor: str = Field(description="Case of the same cohort whose result served as the atlas.")
    recovered: tuple[str, ...] = Field(default=(), description="Names of the structures that were taken over.")
    reason: str = Field(default="", description="Why none was.")
    seconds: float = 0.0


class StatusRecord(Record):
    """``status.json``: how a case went."""

    format: int = RESULTS_FORMAT
    state: Literal["done", "failed"]
    reason: str = ""
    is_input: bool = Field(default=False, description="Whether the query itself is the reason of a failure.")
    attempts: int = 1
    warnings: tuple[str, ...] = Field(default=(), description="Of the result as a whole.")
    total_seconds: float = 0.0
    peak_memory_mb: int | None = None
    seconds: dict[str, float] = Field(default_factory=dict, description="Wall time of each stage.")
    registration_seconds: dict[str, float] = Field(default_factory=dict)
    provenance: Provenance | None = Field(default=None, description="Null for a failure.")
    second_pass: SecondPassRecord | None = Field(default=None, description="Null where there was none.")


class CaseRecord(Record):
    """One case of a cohort."""

    case: str
    query: str
    state: State
    kept: bool = Field(description="Whether an earlier run had done it.")
    reason: str = Field(description="Why it failed.")
    why: str = Field(description='Why it was computed, such as "new", "failed before" or "other settings".')
    attempts: int
    seconds: float
    peak_memory_mb: int | None
    warnings: tuple[str, ...]
    verdict: Verdict | None = None
    """Worst of its structures; null without a result, or where none is judged."""

    recovered: dict[str, str] = Field(
        default_factory=dict, description="Case each structure was recovered with, by name."
    )
    in_run: bool = True
    """Whether this command had the case; if not, its result is of an earlier one."""


class CohortRecord(Record):
    """``cohort.json``: what became of all cases of a command, and which results of earlier ones are beside them."""

    format: int = RESULTS_FORMAT
    version: str
    shard: str | None = None
    device: str
    model: str
    workers: int
    threads: int | None
    cluster: str | None
    counts: dict[str, int]
    wall_seconds: float
    cases: tuple[CaseRecord, ...]
