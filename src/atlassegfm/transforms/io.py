"""Transforms as files that ITK, ANTs and 3D Slicer apply.

A transform folder holds

- ``affine.tfm``: the linear part, an ITK text file in full double precision;
- ``field.nii.gz``: the displacement field, float32, left out where there is none;
- ``local.nii.gz``: the finer one in the box of the labels, likewise;
- ``transform.json``: which way it points, in which order the files are applied, the commands that do so, and the exact
  nodes of the fields, which a NIfTI header rounds to 32 bits.

All are in ITK's frame (LPS, mm), to which RAS+ is turned here and nowhere else. A point of the query goes through the
local field, then the other, then the affine, and arrives in the atlas.

ITK takes the displacement outside a field's nodes as 0, this package as that of the border. A field is written with
as many more nodes, copies of its border, as cover the query's field of view, so that the two are the same map there.
A field that is 0 at its border, as the local one, gets one node more on each side.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.files import PathLike, atomic_path, check_readable
from ..core.geometry import LPS_FLIP, Grid
from ..core.image import IMAGE_SUFFIXES, NIFTI_SUFFIXES, image_suffix
from ..core.itk import itk_grid, require_itk_extra
from .maps import Affine, Chain, DisplacementField, Transform, displacement_on, stages_of

if TYPE_CHECKING:
    import nibabel as nib
    import SimpleITK as sitk

AFFINE_FILE, FIELD_FILE, LOCAL_FILE, NOTE_FILE = "affine.tfm", "field.nii.gz", "local.nii.gz", "transform.json"
#: Endings of transform files that ITK reads.
TRANSFORM_SUFFIXES = (".tfm", ".txt", ".mat", ".h5", ".hdf5", ".hdf", ".xfm")
_TEXT_SUFFIXES = (".tfm", ".txt")
#: In the order in which a point of the query meets them.
_FIELD_FILES = (LOCAL_FILE, FIELD_FILE)
#: Folder of a further ensemble member, in that of the first; counted from 2.
_MEMBER_FOLDER = "fit_{}"
_FORMAT, _VERSION = "AtlasSegFM transform", 1
_LPS_SIGNS = np.array([-1, -1, 1], np.float32)
#: NIfTI intent code "displacement vector": in RAS+. Vectors of all other codes are in LPS, as ITK has them.
_INTENT_DISPLACEMENT = 1006
#: Axes count as orthogonal if the cosines between them are below this.
_ORTHOGONAL = 1e-4
#: A field belongs to its note if their nodes differ by less than this fraction of the spacing: headers have 32 bits.
_SAME_NODES = 0.01
#: A field ends in 0 if the displacements at its border are below this. Fitted ones miss it by rounding alone.
_NOTHING_MM = 1e-4
_EXPECTED_KINDS = (
    "expected linear transforms and displacement fields: convert it to a displacement field "
    "(SimpleITK.TransformToDisplacementField, or Slicer's Transforms module, 'Convert')"
)
_CHECK_FILE = "check that the file is complete and has the right ending"


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Nodes of a field in the fixed world, and how many its file adds: (2, 3) before and after them on each axis."""

    grid: Grid
    margin: NDArray[np.int64]

    @classmethod
    def of(cls, field: DisplacementField, view: Grid) -> _Nodes:
        """Add nodes up to the outer faces of the view, or one where the field ends in 0: 3D Slicer wants two."""
        margin = np.ones((2, 3), np.int64)
        if not _ends_in_zero(field):
            ijk = field.grid.world_to_voxel(view.faces_mm)
            beyond = np.stack([-ijk.min(axis=0), ijk.max(axis=0) - (np.array(field.grid.shape) - 1)])
            margin = np.maximum(np.ceil(beyond), 1).astype(np.int64)
        return cls(field.grid, margin)

    @property
    def stored(self) -> Grid:
        """The grid of the file."""
        affine = self.grid.affine.copy()
        affine[:3, 3] = self.grid.voxel_to_world(-self.margin[0])
        return Grid(tuple(self.grid.shape + self.margin.sum(axis=0)), affine)

    def summary(self) -> dict[str, Any]:
        """For the note; numbers in full precision."""
        before, after = self.margin.tolist()
        grid = {"shape": list(self.grid.shape), "voxel_to_ras_mm": self.grid.affine.tolist()}
        return {**grid, "margin_before": before, "margin_after": after}

    @classmethod
    def from_summary(cls, content: dict[str, Any]) -> _Nodes:
        """Back from the note; InputError, ValueError, TypeError or KeyError where it is not one."""
        margin = np.array([content["margin_before"], content["margin_after"]], np.int64)
        if margin.shape != (2, 3) or margin.min() < 0:
            raise ValueError("margins are three whole numbers from 0")
        return cls(Grid(tuple(content["shape"]), np.array(content["voxel_to_ras_mm"], np.float64)), margin)


def write_transform(
    folder: PathLike,
    linear: Affine,
    field: DisplacementField | None,
    view: Grid,
    local: DisplacementField | None = None,
) -> None:
    """Write a transform folder, whole or not at all; nothing in it names a file or a patient.

    A query point goes through ``local``, then ``field``, then ``linear`` to the atlas world. The files are this map
    inside ``view``, the grid of the query. A field on sheared nodes, which ITK does not know, is sampled onto
    orthogonal ones. InputError if ``folder`` exists, its parent does not, or the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: exists already, and the transform is to go there; choose another place")
    given = {LOCAL_FILE: local, FIELD_FILE: field}
    fields = {name: _on_orthogonal_nodes(one, view) for name, one in given.items() if one is not None}
    nodes = {name: _Nodes.of(one, view) for name, one in fields.items()}
    with atomic_path(folder) as new:
        new.mkdir()
        (new / AFFINE_FILE).write_text(_itk_text(linear), encoding="ascii")
        for name, one in fields.items():
            _nifti_image(one, nodes[name]).to_filename(new / name)
        (new / NOTE_FILE).write_text(json.dumps(_note(nodes), indent=2) + "\n", encoding="utf-8")


def is_transform(path: PathLike) -> bool:
    """Check whether a path may be one transform: a file, or a folder with an affine in it."""
    path = Path(path)
    return (path / AFFINE_FILE).is_file() if path.is_dir() else path.exists()


def read_transform(path: PathLike) -> Transform:
    """Read a transform from query points to atlas points: an Affine, DisplacementField (float32) or Chain of these.

    ``path`` is a folder as :func:`write_transform` makes it (``transform.json`` may be missing), a transform file of
    ITK with linear parts and displacement fields (.tfm, .txt, .mat, .h5), or a displacement field as an image (.nii.gz,
    .mha, .nrrd) with three numbers a voxel. Beyond a field's nodes the displacement of its border holds on, unlike ITK.

    Raises InputError if the path is not such a transform, or the transform is 2-D, has a part of another kind (a
    B-spline), NaN or infinite numbers, or an affine that cannot be undone; MissingExtraError without SimpleITK.
    """
    require_itk_extra("reading transforms")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a saved transform")
    if path.is_dir():
        return _read_folder(path)
    check_readable(path)
    if image_suffix(path) is not None:
        return _read_field(path)
    if not path.name.lower().endswith(TRANSFORM_SUFFIXES):
        known = ", ".join((*TRANSFORM_SUFFIXES[:4], *IMAGE_SUFFIXES))
        raise InputError(f"{path}: not a known transform file; expected a file ending in {known}")
    return _read_itk(path)


def write_members(folder: PathLike, members: Sequence[Transform], view: Grid) -> None:
    """Write the further members of an ensemble into the transform folder of the first, as :func:`write_transform`."""
    for number, member in enumerate(members, start=2):
        local, field, linear = stages_of(member, view)
        write_transform(Path(folder) / _MEMBER_FOLDER.format(number), linear, field, view, local)


def read_transforms(path: PathLike) -> tuple[Transform, ...]:
    """Read a transform as :func:`read_transform`, and the further ensemble members in its folder if there are any."""
    folders = (Path(path) / _MEMBER_FOLDER.format(number) for number in itertools.count(2))
    return (read_transform(path), *map(read_transform, itertools.takewhile(Path.is_dir, folders)))


def _read_folder(folder: Path) -> Transform:
    if not (folder / AFFINE_FILE).is_file():
        wanted = "a transform folder (the folder 'transform' of a result made with --keep) or one transform file"
        raise InputError(f"{folder}: no {AFFINE_FILE} in this folder; expected {wanted}")
    nodes = _read_note(folder / NOTE_FILE)
    fields: list[Transform] = []
    for name in _FIELD_FILES:
        path, listed = folder / name, nodes is not None and name in nodes
        if listed and not path.exists():
            raise InputError(f"{path}: no such file, but {NOTE_FILE} speaks of it; copy it again")
        if not path.exists():
            continue
        if nodes is not None and not listed:
            found = f"{NOTE_FILE} does not list this file, so that it may be of another transform"
            raise InputError(f"{path}: {found}; delete it, or {NOTE_FILE} to read all files as they are")
        fields.append(_read_field(path) if nodes is None else _read_listed(path, nodes[name]))
    linear = _read_itk(folder / AFFINE_FILE)
    return Chain((*fields, linear)) if fields else linear


def _read_listed(path: Path, nodes: _Nodes) -> DisplacementField:
    """One field of a folder, on the nodes of its note."""
    field = _read_field(path)
    if not field.grid.matches(nodes.stored, _SAME_NODES):
        found = f"{field.grid.describe()}, but {NOTE_FILE} speaks of {nodes.stored.describe()}"
        raise InputError(f"{path}: {found}; copy the folder again, or delete {NOTE_FILE} if the field is right")
    i, j, k = (slice(b, b + n) for b, n in zip(nodes.margin[0], nodes.grid.shape, strict=True))
    return DisplacementField(nodes.grid, np.ascontiguousarray(field.displacement_mm[:, i, j, k]))


def _read_note(path: Path) -> dict[str, _Nodes] | None:
    """The nodes of each field by the name of its file; None where there is no note."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError("of another program or version")
        return {name: _Nodes.from_summary(nodes) for name, nodes in content["fields"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError):
        advice = "copy the folder again, or delete this file to read the others as they are"
        raise InputError(f"{path}: not a note of a transform as this version writes it; {advice}") from None


def _note(nodes: dict[str, _Nodes]) -> dict[str, Any]:
    """What ``transform.json`` says; ``nodes`` by the names of the fields' files, the first applied first."""
    order = [*nodes, AFFINE_FILE]
    stems = [name.split(".")[0] for name in reversed(order)]  # as 3D Slicer names them, the outermost first
    tree = [f"the atlas under {stems[0]}", *(f"{inner} under {outer}" for inner, outer in itertools.pairwise(stems))]
    ants = "antsApplyTransforms -d 3 -i ATLAS.nii.gz -r QUERY.nii.gz -o OUT.nii.gz"
    simpleitk = [
        "import SimpleITK as sitk",
        "chain = sitk.CompositeTransform(3)  # what is added last is applied to a point first",
        f"chain.AddTransform(sitk.ReadTransform('{AFFINE_FILE}'))",
    ]
    for name, stem in zip(reversed(nodes), stems[1:], strict=True):
        simpleitk += [
            f"{stem} = sitk.ReadImage('{name}', sitk.sitkVectorFloat64)",
            f"chain.AddTransform(sitk.DisplacementFieldTransform({stem}))",
        ]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "direction": "takes points of the query to points of the atlas, and so pulls the atlas image onto the query",
        "frame": "LPS, mm (ITK)",
        "applied_to_a_query_point": order,
        "ants": [" -t ".join([ants, *order]), "for a label map add: -n GenericLabel"],
        "simpleitk": [*simpleitk, "warped = sitk.Resample(atlas, query, chain, sitk.sitkLinear, 0.0)"],
        "slicer": f"add the files as 'Transform', not as 'Volume'; in the Data module put {', '.join(tree)}",
        "fields": {name: one.summary() for name, one in nodes.items()},
    }


def _itk_text(linear: Affine) -> str:
    """The linear part as ITK writes it, in LPS; without SimpleITK, which is an extra."""
    matrix = LPS_FLIP @ linear.matrix @ LPS_FLIP
    numbers = [*matrix[:3, :3].ravel().tolist(), *matrix[:3, 3].tolist()]
    head = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3"
    return f"{head}\nParameters: {' '.join(map(repr, numbers))}\nFixedParameters: 0 0 0\n"


def _nifti_image(field: DisplacementField, nodes: _Nodes) -> nib.Nifti1Image:
    """The field with its margin, in LPS, as ITK and ANTs write it: five axes and intent 1007."""
    import nibabel as nib

    padded = np.pad(field.displacement_mm, [(0, 0), *nodes.margin.T.tolist()], mode="edge")
    vectors = np.moveaxis(padded, 0, 3)[:, :, :, None] * _LPS_SIGNS
    image = nib.Nifti1Image(vectors, nodes.stored.affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.set_sform(nodes.stored.affine, code="scanner")
    image.set_qform(nodes.stored.affine, code="scanner")
    return image


def _ends_in_zero(field: DisplacementField) -> bool:
    """Whether a field moves nothing at its border, and so nothing beyond."""
    values = np.abs(field.displacement_mm)
    return all(values.take(end, axis=axis).max() < _NOTHING_MM for axis in (1, 2, 3) for end in (0, -1))


def _on_orthogonal_nodes(field: DisplacementField, view: Grid) -> DisplacementField:
    """The field itself, or about the same map on nodes along the world's axes: ITK knows no sheared grids."""
    axes = field.grid.affine[:3, :3] / field.grid.spacing_mm
    if np.abs(axes.T @ axes - np.eye(3)).max() < _ORTHOGONAL:
        return field
    corners = field.grid.corners_mm
    if not _ends_in_zero(field):
        # What lies between the field and the view belongs to it: its border holds on along its own axes.
        corners = np.concatenate([corners, view.corners_mm])
    margin_mm = float(view.spacing_mm.sum()) / 2  # half a voxel of border, whatever the axes
    low, high = corners.min(axis=0) - margin_mm, corners.max(axis=0) + margin_mm
    spacing_mm = float(field.grid.spacing_mm.min())
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = low
    return displacement_on(field, Grid(tuple(np.ceil((high - low) / spacing_mm) + 1), affine))


def _read_itk(path: Path) -> Transform:
    """A transform file; the parts of a composite in the order they are applied in."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    _check_one_transform(path)
    try:
        transform = sitk.ReadTransform(str(path))
    except KeyError:
        raise InputError(f"{path}: a kind of transform that SimpleITK does not know; {_EXPECTED_KINDS}") from None
    except RuntimeError:
        raise InputError(f"{path}: not readable as a transform of ITK; {_CHECK_FILE}") from None
    stages = _stages(transform, path)
    return stages[0] if len(stages) == 1 else Chain(tuple(stages))


def _check_one_transform(path: Path) -> None:
    """ITK reads the first transform of a text file with several, and leaves out the rest."""
    if not path.name.lower().endswith(_TEXT_SUFFIXES):
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        kinds = [line.split(":", 1)[1].strip() for line in file if line.startswith("Transform:")]
    if len(kinds) > 1 and not kinds[0].startswith("Composite"):
        raise InputError(f"{path}: {len(kinds)} transforms in one file; expected one, or a composite of them in order")


def _stages(transform: sitk.Transform, path: Path) -> list[Transform]:
    """The parts of a transform of ITK, the first applied first."""
    import SimpleITK as sitk

    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform is {transform.GetDimension()}-D; expected a 3-D one")
    if isinstance(transform, sitk.CompositeTransform):
        # What was added last is applied first.
        parts = [transform.GetNthTransform(n) for n in reversed(range(transform.GetNumberOfTransforms()))]
        return [stage for part in parts for stage in _stages(part, path)]
    if isinstance(transform, sitk.DisplacementFieldTransform):
        image = transform.GetDisplacementField()
        return [_field_of(image, _vectors_of(image), path)]
    if not transform.IsLinear():
        raise InputError(f"{path}: a {transform.GetName()}; {_EXPECTED_KINDS}")
    return [_affine_of(transform, path)]


def _affine_of(transform: Any, path: Path) -> Affine:
    """A linear transform of ITK, which maps x to matrix (x - centre) + centre + translation."""
    lps = np.eye(4)
    if hasattr(transform, "GetMatrix"):
        lps[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
        centre = np.array(transform.GetCenter())
        lps[:3, 3] = np.array(transform.GetTranslation()) if hasattr(transform, "GetTranslation") else 0
        lps[:3, 3] += centre - lps[:3, :3] @ centre
    else:
        lps[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
        for axis, unit in enumerate(np.eye(3).tolist()):
            lps[:3, axis] = np.array(transform.TransformPoint(unit)) - lps[:3, 3]
    if not np.isfinite(lps).all():
        raise InputError(f"{path}: the affine has NaN or infinite numbers; make the transform anew")
    affine = Affine(LPS_FLIP @ lps @ LPS_FLIP)
    if not affine.is_invertible:
        raise InputError(f"{path}: the affine presses space flat; expected a map that can be undone")
    return affine


def _read_field(path: Path) -> DisplacementField:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        if len(size) != 3 or components != 3:
            raise InputError(
                f"{path}: {len(size)} dimensions ({' x '.join(map(str, size))}) and {components} numbers a voxel; "
                "expected a displacement field: 3 dimensions, 3 numbers a voxel (in NIfTI five axes, I x J x K x 1 x 3)"
            )
        is_nifti = image_suffix(path) in NIFTI_SUFFIXES
        vectors = _nifti_vectors(path, size) if is_nifti else _vectors_of(reader.Execute())
    except (RuntimeError, EOFError, OSError, ValueError, zlib.error) as error:
        if "orthonormal" in str(error).lower():
            raise InputError(f"{path}: the axes of the field are not at right angles, as ITK wants them") from None
        raise InputError(f"{path}: not readable as a displacement field; {_CHECK_FILE}") from None
    return _field_of(reader, vectors, path)


def _vectors_of(image: sitk.Image) -> NDArray[np.float32]:
    """(3, I, J, K) RAS+ mm from an image of ITK."""
    import SimpleITK as sitk

    vectors = np.asarray(sitk.GetArrayViewFromImage(image))
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused later
        return np.moveaxis(vectors.astype(np.float32) * _LPS_SIGNS, (3, 2, 1, 0), (0, 1, 2, 3))


def _nifti_vectors(path: Path, size: Sequence[int]) -> NDArray[np.float32]:
    """(3, I, J, K) RAS+ mm from a NIfTI file; not by ITK, which makes 0 of NaN without a word."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nib.load(path)
    except ImageFileError as error:
        raise ValueError(str(error)) from None
    with np.errstate(over="ignore"):
        vectors = np.asarray(image.dataobj, dtype=np.float32).reshape(*size, 3)
    is_ras = int(image.header["intent_code"]) == _INTENT_DISPLACEMENT
    return np.moveaxis(vectors if is_ras else vectors * _LPS_SIGNS, 3, 0)


def _field_of(image: Any, displacement: NDArray[np.float32], path: Path) -> DisplacementField:
    """A displacement field from the geometry of an image of ITK (or its reader) and (3, I, J, K) vectors, RAS+ mm."""
    if bad := int((~np.isfinite(displacement)).any(axis=0).sum()):
        found = f"{bad} of {displacement[0].size} displacements are NaN or infinite"
        raise InputError(f"{path}: {found}; expected numbers only: replace them (by 0, for instance)")
    return DisplacementField(itk_grid(image, path), np.ascontiguousarray(displacement))
