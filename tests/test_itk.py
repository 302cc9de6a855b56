"""Transform files against SimpleITK, which reads and applies them by itself."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, save_volume
from atlassegfm.registration import Registration
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.io import read_transform, write_transform
from atlassegfm.transforms.maps import Affine, Chain, DisplacementField, Transform, displacement_on
from atlassegfm.transforms.resample import resample, warp_labels
from conftest import ORIENTATIONS, SHEARED, Run, affine_of, rotation
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid

#: The module: the package shows the function of this name.
method = importlib.import_module("atlassegfm.segment")

Factory = Callable[..., Volume]

LPS = np.array([-1.0, -1.0, 1.0])
#: Where the axes of a query may point; anisotropic, so that swapped axes show.
AXES = {
    **{name: ORIENTATIONS[name] for name in ("RAS", "LPS", "LAS", "oblique", "oblique-flipped")},
    "PIR": affine_of(np.array([[0, 0, 4.0], [-1.5, 0, 0], [0, -2.0, 0]]), (1.0, 2.0, 3.0)),
}
TURN = rotation(4, -6, 9) * 1.07


def query_grid(name: str) -> Grid:
    return Grid((11, 12, 9), AXES[name])


def smooth_field(grid: Grid, amount_mm: float = 3.0, seed: int = 0) -> DisplacementField:
    noise = np.random.default_rng(seed).normal(size=(3, *grid.shape))
    values = np.stack([ndimage.gaussian_filter(one, 1, mode="nearest") for one in noise])
    return DisplacementField(grid, (values * amount_mm / values.std()).astype(np.float32))


def nodes_inside(view: Grid) -> Grid:
    """Nodes along other axes that end before the field of view does, as those of a coarse level may."""
    axes = view.affine[:3, :3] @ rotation(0, 7, 0) * (1.9, 1.3, 1.1)
    shape = (4, 5, 6)
    return Grid(shape, affine_of(axes, tuple(view.centre_mm - axes @ ((np.array(shape) - 1) / 2))))


def straight(view: Grid) -> Grid:
    """The same with axes at right angles, which a turn of voxel axes of several lengths does not keep."""
    nodes = nodes_inside(view)
    axes = np.linalg.qr(nodes.affine[:3, :3])[0] * (2.9, 3.1, 4.7)
    return Grid(nodes.shape, affine_of(axes, tuple(nodes.centre_mm - axes @ ((np.array(nodes.shape) - 1) / 2))))


def local_field(view: Grid, seed: int = 1) -> DisplacementField:
    """In a box within the view, along axes and on nodes of its own; 0 at its border, and far from it 2 mm beside it."""
    axes = np.linalg.qr(view.affine[:3, :3])[0] @ rotation(3, -5, 8) * (1.3, 1.1, 2.3)
    shape = (8, 10, 7)
    grid = Grid(shape, affine_of(axes, tuple(view.centre_mm - axes @ ((np.array(shape) - 1) / 2))))
    values = np.zeros((3, *shape), np.float32)
    values[:, 1:-1, 1:-1, 1:-1] = smooth_field(grid, 2.0, seed).displacement_mm[:, 1:-1, 1:-1, 1:-1]
    return DisplacementField(grid, values)


def linear_about(view: Grid) -> Affine:
    centre = view.centre_mm
    return Affine(affine_of(TURN, tuple(centre - TURN @ centre + (1.7, -2.3, 0.9))))


def points_in(view: Grid, count: int = 300) -> np.ndarray:
    """Anywhere in a field of view, its outermost half voxel and its corners included."""
    shape = np.array(view.shape)
    ijk = np.random.default_rng(3).uniform(-0.5, shape - 0.5, (count, 3))
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, 8).T
    return view.voxel_to_world(np.concatenate([ijk, corners]))


def sitk_of(folder: Path) -> sitk.Transform:
    """The files of a folder as another program takes them."""
    chain = sitk.CompositeTransform(3)
    chain.AddTransform(sitk.ReadTransform(str(folder / "affine.tfm")))
    for name in ("field.nii.gz", "local.nii.gz"):  # what is added last is applied first
        if (folder / name).exists():
            image = sitk.ReadImage(str(folder / name), sitk.sitkVectorFloat64)
            chain.AddTransform(sitk.DisplacementFieldTransform(image))
    return chain


def mapped_by(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(point) for point in (points * LPS).tolist()]) * LPS


def sitk_image(volume: Volume) -> sitk.Image:
    """By hand, not by the package."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.transpose(2, 1, 0)))
    lps = np.diag([*LPS, 1.0]) @ volume.grid.affine
    image.SetSpacing(volume.grid.spacing_mm.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / volume.grid.spacing_mm).ravel().tolist())
    return image


def field_image(field: DisplacementField) -> sitk.Image:
    vectors = np.moveaxis(field.displacement_mm, (0, 1, 2, 3), (3, 2, 1, 0)) * LPS.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)
    image.CopyInformation(sitk_image(Volume(np.zeros(field.grid.shape, np.float32), field.grid)))
    return image


# --- what is written is what we apply


@pytest.mark.parametrize("name", AXES)
def test_itk_maps_points_as_we_do(tmp_path: Path, name: str) -> None:
    view = query_grid(name)
    field, linear = smooth_field(straight(view)), linear_about(view)
    write_transform(tmp_path / "transform", linear, field, view)
    points = points_in(view)
    ours = Chain((field, linear)).map(points)
    assert np.linalg.norm(ours - linear.map(points), axis=1).max() > 3
    assert not field.grid.contains(points).all()  # the margin is needed
    np.testing.assert_allclose(mapped_by(sitk_of(tmp_path / "transform"), points), ours, atol=1e-3)


@pytest.mark.parametrize("name", AXES)
def test_itk_maps_points_through_two_fields_as_we_do(tmp_path: Path, name: str) -> None:
    view = query_grid(name)
    local, field, linear = local_field(view), smooth_field(straight(view)), linear_about(view)
    write_transform(tmp_path / "transform", linear, field, view, local)
    points = np.concatenate([points_in(view), points_in(local.grid)])
    ours = Chain((local, field, linear)).map(points)
    theirs = mapped_by(sitk_of(tmp_path / "transform"), points)
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    # Each other order is another map.
    for stages in ((field, linear), (field, local, linear), (local, linear, field)):
        assert np.linalg.norm(Chain(stages).map(points) - theirs, axis=1).max() > 0.5


@pytest.mark.parametrize("name", AXES)
def test_a_field_that_ends_in_zero_needs_no_margin(tmp_path: Path, name: str) -> None:
    view = query_grid(name)
    local = local_field(view)
    # As fitted ones are: but for rounding.
    border = DisplacementField(local.grid, np.where(local.displacement_mm == 0, 5e-6, local.displacement_mm))
    write_transform(tmp_path / "t", Affine.identity(), None, view, border)
    image = sitk.ReadImage(str(tmp_path / "t" / "local.nii.gz"))
    assert image.GetSize() == tuple(n + 2 for n in local.grid.shape)
    shape = np.array(local.grid.shape)
    random = np.random.default_rng(4)
    theirs = sitk_of(tmp_path / "t")
    inside = local.grid.voxel_to_world(random.uniform(0, shape - 1, (200, 3)))
    np.testing.assert_allclose(mapped_by(theirs, inside), local.map(inside), atol=1e-3)
    # Just outside, half a node off, on the faces and in the corners of the file and beyond.
    for distance in (1e-6, 0.3, 0.5, 0.999, 1.0, 1.001, 1.5, 1.501, 4.0):
        beside = random.uniform(-distance, shape - 1 + distance, (30, 3))
        sides = np.eye(3, dtype=bool)[random.integers(0, 3, 30)]
        beside = np.where(sides, np.where(random.random((30, 3)) < 0.5, -distance, shape - 1 + distance), beside)
        corners = np.array(np.meshgrid(*[(-distance, n - 1 + distance) for n in shape])).reshape(3, 8).T
        points = local.grid.voxel_to_world(np.concatenate([beside, corners]))
        np.testing.assert_allclose(mapped_by(theirs, points), points, atol=2e-5)


@pytest.mark.parametrize("name", AXES)
def test_itk_resamples_as_we_do(tmp_path: Path, synthetic_image: Factory, name: str) -> None:
    view = query_grid(name)
    atlas = synthetic_image((14, 15, 16), ORIENTATIONS["oblique"])
    shift = atlas.grid.centre_mm - view.centre_mm
    linear = Affine(affine_of(np.eye(3), tuple(shift)) @ linear_about(view).matrix)
    field, local = smooth_field(straight(view)), local_field(view)
    write_transform(tmp_path / "transform", linear, field, view, local)
    query = sitk_image(Volume(np.zeros(view.shape, np.float32), view))
    theirs = sitk.Resample(sitk_image(atlas), query, sitk_of(tmp_path / "transform"), sitk.sitkLinear, -1000.0)
    chain = Chain((local, field, linear))
    ours = resample(atlas, view, chain, outside=-1000)
    voxels = view.voxel_to_world(np.moveaxis(np.indices(view.shape), 0, -1))
    ijk = atlas.grid.world_to_voxel(chain.map(voxels.reshape(-1, 3)).reshape(voxels.shape))
    # Half a voxel around the outermost centres, ITK's rounding and ours may differ.
    inside = ((ijk > 0) & (ijk < np.array(atlas.grid.shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.3
    gap = np.abs(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) - ours)[inside]
    assert gap.max() < 1e-3 * np.ptp(atlas.data)


VIEW = query_grid("oblique-flipped")
FIELD, LINEAR, LOCAL = smooth_field(straight(VIEW), seed=5), linear_about(VIEW), local_field(VIEW, seed=6)
WHOLE = Chain((LOCAL, FIELD, LINEAR))
FILES = {"affine.tfm", "field.nii.gz", "local.nii.gz", "transform.json"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "transform"
    write_transform(folder, LINEAR, FIELD, VIEW, LOCAL)
    return folder


@pytest.fixture(scope="module")
def chain(written: Path) -> sitk.Transform:
    return sitk_of(written)


@settings(max_examples=100)
@given(share=st.tuples(*[st.floats(0, 1)] * 3))
def test_any_point_of_the_view(chain: sitk.Transform, share: tuple[float, float, float]) -> None:
    point = VIEW.voxel_to_world(np.array(share) * VIEW.shape - 0.5)[None]
    np.testing.assert_allclose(mapped_by(chain, point), WHOLE.map(point), atol=1e-3)


@settings(max_examples=30)
@given(
    matrix=st.lists(st.floats(-0.3, 0.3), min_size=9, max_size=9),
    shift=st.tuples(*[st.floats(-1000, 1000)] * 3),
)
def test_any_affine_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, matrix: list[float], shift: tuple[float, float, float]
) -> None:
    linear = Affine(affine_of(np.eye(3) + np.array(matrix).reshape(3, 3), shift))
    folder = tmp_path_factory.mktemp("affine") / "transform"
    if not linear.is_invertible:
        return
    write_transform(folder, linear, None, VIEW)
    back = read_transform(folder)
    assert isinstance(back, Affine)
    np.testing.assert_array_equal(back.matrix, linear.matrix)


def test_what_is_read_is_what_was_written_to_the_last_bit(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    back = read_transform(written)
    assert isinstance(back, Chain)
    *fields, linear = back.stages
    assert isinstance(linear, Affine)
    np.testing.assert_array_equal(linear.matrix, LINEAR.matrix)
    for field, expected in zip(fields, (LOCAL, FIELD), strict=True):
        assert isinstance(field, DisplacementField)
        assert field.grid.shape == expected.grid.shape
        np.testing.assert_array_equal(field.grid.affine, expected.grid.affine)
        np.testing.assert_array_equal(field.displacement_mm, expected.displacement_mm)


@pytest.mark.parametrize("which", ["field", "local"])
def test_one_field_of_the_two(tmp_path: Path, which: str) -> None:
    field, local = (FIELD, None) if which == "field" else (None, LOCAL)
    write_transform(tmp_path / "t", LINEAR, field, VIEW, local)
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert names == {"affine.tfm", f"{which}.nii.gz", "transform.json"}
    note = json.loads((tmp_path / "t" / "transform.json").read_text())
    assert note["ants"][0].endswith(f" -o OUT.nii.gz -t {which}.nii.gz -t affine.tfm")
    assert note["slicer"].endswith(f"put the atlas under affine, affine under {which}")
    points = points_in(VIEW)
    ours = Chain((field or LOCAL, LINEAR)).map(points)
    np.testing.assert_array_equal(read_transform(tmp_path / "t").map(points), ours)
    np.testing.assert_allclose(mapped_by(sitk_of(tmp_path / "t"), points), ours, atol=1e-3)


@pytest.mark.parametrize("name", ["field.nii.gz", "local.nii.gz"])
def test_files_are_in_the_form_that_ants_writes(written: Path, name: str) -> None:
    header = nib.load(written / name).header
    assert header["dim"][0] == 5
    assert header["dim"][4:6].tolist() == [1, 3]
    assert int(header["intent_code"]) == 1007
    assert header.get_data_dtype() == np.float32
    text = (written / "affine.tfm").read_text()
    assert text.startswith("#Insight Transform File V1.0")
    assert "Transform: AffineTransform_double_3_3" in text


def test_the_note_names_the_commands_and_nobody(written: Path) -> None:
    text = (written / "transform.json").read_text()
    note = json.loads(text)
    assert note["ants"][0].endswith(" -o OUT.nii.gz -t local.nii.gz -t field.nii.gz -t affine.tfm")
    assert note["applied_to_a_query_point"] == ["local.nii.gz", "field.nii.gz", "affine.tfm"]
    assert "query to points of the atlas" in note["direction"]
    assert note["slicer"].startswith("add the files as 'Transform'")
    assert note["slicer"].endswith("put the atlas under affine, affine under field, field under local")
    for part in written.parts[1:]:
        assert part == "transform" or part not in text


def test_the_simpleitk_lines_of_the_note_do_it(
    written: Path, synthetic_image: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = synthetic_image((11, 12, 9), VIEW.affine)
    monkeypatch.chdir(written)
    names: dict[str, Any] = {"atlas": sitk_image(atlas), "query": sitk_image(atlas)}
    exec("\n".join(json.loads(Path("transform.json").read_text())["simpleitk"]), names)  # noqa: S102
    warped = sitk.GetArrayFromImage(names["warped"]).transpose(2, 1, 0)
    ours = resample(atlas, VIEW, WHOLE)
    assert np.abs(warped - ours)[3:-3, 3:-3, 3:-3].max() < 1e-3 * np.ptp(atlas.data)


def test_without_a_field_there_is_none(tmp_path: Path) -> None:
    write_transform(tmp_path / "t", LINEAR, None, VIEW)
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"affine.tfm", "transform.json"}
    note = json.loads((tmp_path / "t" / "transform.json").read_text())
    assert note["ants"][0].endswith("-o OUT.nii.gz -t affine.tfm")
    assert not any("Field" in line for line in note["simpleitk"])
    assert note["slicer"].endswith("put the atlas under affine")


def test_a_field_of_one_node(tmp_path: Path) -> None:
    shift = np.array([4, -5, 6], np.float32).reshape(3, 1, 1, 1)
    field = DisplacementField(Grid((1, 1, 1), affine_of(np.diag([9.0, 9, 9]), tuple(VIEW.centre_mm))), shift)
    write_transform(tmp_path / "t", Affine.identity(), field, VIEW)
    points = points_in(VIEW)
    np.testing.assert_allclose(mapped_by(sitk_of(tmp_path / "t"), points), points + (4, -5, 6), atol=1e-3)
    np.testing.assert_array_equal(read_transform(tmp_path / "t").map(points), Chain((field,)).map(points))


def test_sheared_nodes_are_written_straight(tmp_path: Path) -> None:
    """ITK has no sheared grids: the field is sampled on others, which cover the view, in a smooth one to a little."""
    grid = Grid((11, 12, 9), SHEARED)
    nodes = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)) - grid.centre_mm
    bent = np.moveaxis(3 * np.sin(nodes / 15), -1, 0).astype(np.float32)
    field = DisplacementField(grid, bent)
    write_transform(tmp_path / "t", LINEAR, field, grid)
    points = points_in(grid)
    np.testing.assert_allclose(mapped_by(sitk_of(tmp_path / "t"), points), LINEAR.map(field.map(points)), atol=0.1)
    np.testing.assert_allclose(read_transform(tmp_path / "t").map(points), LINEAR.map(field.map(points)), atol=0.1)


def test_a_sheared_box_is_written_straight(tmp_path: Path) -> None:
    """The box alone, not all of the view."""
    grid = Grid((11, 12, 9), SHEARED)
    box = Grid((13, 12, 11), affine_of(SHEARED[:3, :3] * 0.3, tuple(grid.voxel_to_world((4, 4, 3)))))
    ijk = np.moveaxis(np.indices(box.shape), 0, -1)
    hump = np.sin(np.pi * ijk / (np.array(box.shape) - 1)).prod(axis=-1)
    hump[[0, -1]] = hump[:, [0, -1]] = hump[:, :, [0, -1]] = 0
    local = DisplacementField(box, np.multiply.outer([1.0, -2.0, 0.5], hump).astype(np.float32))
    write_transform(tmp_path / "t", LINEAR, None, grid, local)
    back = read_transform(tmp_path / "t")
    assert isinstance(back, Chain)
    assert isinstance(back.stages[0], DisplacementField)
    assert np.prod(back.stages[0].grid.shape) * back.stages[0].grid.voxel_volume_mm3 < grid.voxel_volume_mm3 * 700
    points = np.concatenate([points_in(grid), points_in(box)])
    expected = Chain((local, LINEAR)).map(points)
    np.testing.assert_allclose(back.map(points), expected, atol=0.1)
    np.testing.assert_allclose(mapped_by(sitk_of(tmp_path / "t"), points), expected, atol=0.1)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_transform(tmp_path / "t", LINEAR, None, VIEW)
    with pytest.raises(InputError, match=r"t: exists already, and the transform is to go there; choose another place"):
        write_transform(tmp_path / "t", LINEAR, FIELD, VIEW)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk refuses")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", refuse)
    with pytest.raises(InputError, match=r"other: cannot write there \(the disk refuses\); choose another place"):
        write_transform(tmp_path / "other", LINEAR, FIELD, VIEW)
    with pytest.raises(InputError, match=r"absent/t: cannot write there \(No such file or directory\)"):
        write_transform(tmp_path / "absent" / "t", LINEAR, None, VIEW)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


# --- what other programs write


def assert_same_map(transform: Transform, theirs: sitk.Transform, points: np.ndarray, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(transform.map(points), mapped_by(theirs, points), atol=atol)


CENTRE = (3.0, -4.0, 5.0)


def _scaling() -> sitk.Transform:
    scaling = sitk.ScaleTransform(3, (1.1, 0.9, 1.2))
    scaling.SetCenter(CENTRE)
    return scaling


def _affine() -> sitk.Transform:
    return sitk.AffineTransform(TURN.ravel().tolist(), (1.0, 2.0, 3.0), CENTRE)


LINEARS: dict[str, Callable[[], sitk.Transform]] = {
    "affine": _affine,
    "scale": _scaling,
    "identity": lambda: sitk.Transform(3, sitk.sitkIdentity),
    "translation": lambda: sitk.TranslationTransform(3, (11.0, -7.0, 3.5)),
    "euler": lambda: sitk.Euler3DTransform(CENTRE, 0.1, -0.2, 0.3, (4.0, 5.0, 6.0)),
    "versor": lambda: sitk.VersorRigid3DTransform((1, 2, 3), 0.4, (4.0, 5.0, 6.0), CENTRE),
    "similarity": lambda: sitk.Similarity3DTransform(1.2, (1, 2, 3), 0.4, (4.0, 5.0, 6.0), CENTRE),
    "scale-versor": lambda: sitk.ScaleVersor3DTransform((1.1, 1, 0.9), (1, 2, 3), 0.4, (4.0, 5.0, 6.0), CENTRE),
}


@pytest.mark.parametrize("ending", [".tfm", ".txt", ".mat", ".h5"])
@pytest.mark.parametrize("kind", LINEARS)
def test_linear_transforms_of_itk(tmp_path: Path, kind: str, ending: str) -> None:
    transform = LINEARS[kind]()
    sitk.WriteTransform(transform, str(tmp_path / f"one{ending}"))
    read = read_transform(tmp_path / f"one{ending}")
    assert isinstance(read, Affine)
    assert_same_map(read, transform, points_in(VIEW, 20), 1e-9)


def test_composites_in_the_order_of_itk(tmp_path: Path) -> None:
    """Nested, and with a field in the middle: each order gives another map."""
    inner = sitk.CompositeTransform([_affine(), sitk.DisplacementFieldTransform(sitk.Cast(field_image(FIELD), _F64))])
    outer = sitk.CompositeTransform([_scaling(), inner, sitk.TranslationTransform(3, (2.0, 0.0, -1.0))])
    flat = sitk.CompositeTransform(outer)
    flat.FlattenTransform()
    sitk.WriteTransform(flat, str(tmp_path / "chain.h5"))
    read = read_transform(tmp_path / "chain.h5")
    assert isinstance(read, Chain)
    assert [type(stage).__name__ for stage in read.stages] == ["Affine", "DisplacementField", "Affine", "Affine"]
    middle = points_in(FIELD.grid.crop((1, 1, 1), (3, 4, 5)), 50)
    assert_same_map(read, outer, middle)
    linears = sitk.CompositeTransform([_scaling(), _affine()])
    sitk.WriteTransform(linears, str(tmp_path / "linears.tfm"))
    assert_same_map(read_transform(tmp_path / "linears.tfm"), linears, middle, 1e-9)


_F64 = sitk.sitkVectorFloat64


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("kind", [sitk.sitkVectorFloat32, _F64])
def test_displacement_images(tmp_path: Path, ending: str, kind: int) -> None:
    path = tmp_path / f"warp{ending}"
    sitk.WriteImage(sitk.Cast(field_image(FIELD), kind), str(path))
    read = read_transform(path)
    assert isinstance(read, DisplacementField)
    np.testing.assert_array_equal(read.displacement_mm, FIELD.displacement_mm)
    points = points_in(FIELD.grid)[:300]  # (on the very edge rounding decides whether ITK has a displacement)
    theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), _F64))
    assert_same_map(read, theirs, points)


def test_nifti_displacements_in_ras(tmp_path: Path) -> None:
    """Intent 1006 (displacement vector) is in NIfTI's own frame; 1007, which ITK and ANTs write, is in LPS."""
    data = np.moveaxis(FIELD.displacement_mm, 0, -1)[:, :, :, None, :]
    image = nib.Nifti1Image(data, FIELD.grid.affine)
    image.header["intent_code"] = 1006
    nib.save(image, tmp_path / "ras.nii.gz")
    read = read_transform(tmp_path / "ras.nii.gz")
    assert isinstance(read, DisplacementField)
    np.testing.assert_array_equal(read.displacement_mm, FIELD.displacement_mm)
    theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "ras.nii.gz"), _F64))
    assert_same_map(read, theirs, points_in(FIELD.grid)[:300])


def test_a_folder_without_a_note_is_read_as_it_is(written: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in FILES - {"transform.json"}:
        (tmp_path / "t" / name).write_bytes((written / name).read_bytes())
    points = points_in(VIEW)
    np.testing.assert_allclose(read_transform(tmp_path / "t").map(points), WHOLE.map(points), atol=1e-3)


# --- what cannot be read


def _write(name: str, transform: Callable[[], sitk.Transform]) -> Callable[[Path], None]:
    return lambda folder: sitk.WriteTransform(transform(), str(folder / name))


def _image(name: str, image: Callable[[], sitk.Image]) -> Callable[[Path], None]:
    return lambda folder: sitk.WriteImage(image(), str(folder / name))


def _text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _spline() -> sitk.Transform:
    return sitk.BSplineTransformInitializer(sitk.Image([8, 8, 8], sitk.sitkFloat32), [2, 2, 2])


def _with_nan() -> sitk.Image:
    values = FIELD.displacement_mm.copy()
    values[1, 2, 3, 4] = np.nan
    values[:, 0, 0, 0] = np.inf
    return field_image(DisplacementField(FIELD.grid, values))


def _truncated(folder: Path) -> None:
    sitk.WriteImage(field_image(FIELD), str(folder / "w.nii.gz"))
    whole = (folder / "w.nii.gz").read_bytes()
    (folder / "w.nii.gz").write_bytes(whole[: len(whole) // 2])


def _two_transforms() -> str:
    one = "Transform: TranslationTransform_double_3_3\nParameters: 1 2 3\nFixedParameters:\n"
    return "#Insight Transform File V1.0\n#Transform 0\n" + one + "#Transform 1\n" + one


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing": (lambda _: None, "a.tfm", r"a\.tfm: no such file or folder; expected a saved transform"),
    "empty": (_text("a.tfm", ""), "a.tfm", r"a\.tfm: the file is empty \(0 bytes\); copy it again"),
    "ending": (
        _text("a.json", "{}"),
        "a.json",
        r"a\.json: not a known transform file; expected a file ending in \.tfm",
    ),
    "text": (_text("a.tfm", "hello"), "a.tfm", r"a\.tfm: not readable as a transform of ITK; check that the file is"),
    "damaged": (_text("a.h5", "hello"), "a.h5", r"a\.h5: not readable as a transform of ITK; check that the file is"),
    "unknown kind": (
        _text("a.tfm", "#Insight Transform File V1.0\nTransform: MagicTransform_double_3_3\nParameters: 1\n"),
        "a.tfm",
        r"a\.tfm: not readable as a transform of ITK",
    ),
    "rare kind": (
        _write("a.tfm", sitk.ComposeScaleSkewVersor3DTransform),
        "a.tfm",
        r"a\.tfm: a kind of transform that SimpleITK does not know; expected linear transforms and displacement fields",
    ),
    "two": (
        _text("a.txt", _two_transforms()),
        "a.txt",
        r"a\.txt: 2 transforms in one file; expected one, or a composite",
    ),
    "2-D": (_write("a.tfm", sitk.Euler2DTransform), "a.tfm", r"a\.tfm: the transform is 2-D; expected a 3-D one"),
    "B-spline": (
        _write("a.tfm", _spline),
        "a.tfm",
        r"a\.tfm: a BSplineTransform; expected linear transforms and displacement fields: convert it to a displacement",
    ),
    "B-spline inside": (
        _write("a.h5", lambda: sitk.CompositeTransform([_affine(), _spline()])),
        "a.h5",
        r"a\.h5: a BSplineTransform; expected linear",
    ),
    "flat": (
        _write("a.tfm", lambda: sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 1e-9], [0, 0, 0])),
        "a.tfm",
        r"a\.tfm: the affine presses space flat; expected a map that can be undone",
    ),
    "NaN affine": (
        _write("a.tfm", lambda: sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 1], [np.nan, 0, 0])),
        "a.tfm",
        r"a\.tfm: (the affine has NaN or infinite numbers; make the transform anew|not readable as a transform)",
    ),
    "NaN field": (
        _image("w.nii.gz", _with_nan),
        "w.nii.gz",
        r"w\.nii\.gz: 2 of 120 displacements are NaN or infinite; expected numbers only: replace them",
    ),
    "scalar": (
        _image("w.nii.gz", lambda: sitk.Image([5, 6, 7], sitk.sitkFloat32)),
        "w.nii.gz",
        r"w\.nii\.gz: 3 dimensions \(5 x 6 x 7\) and 1 numbers a voxel; expected a displacement field: 3 dimensions",
    ),
    "4-D": (
        _image("w.nii.gz", lambda: sitk.Image([5, 6, 7, 3], sitk.sitkFloat32)),
        "w.nii.gz",
        r"w\.nii\.gz: 4 dimensions \(5 x 6 x 7 x 3\) and 1 numbers a voxel; expected a displacement field",
    ),
    "damaged image": (
        _text("w.nii.gz", "hello"),
        "w.nii.gz",
        r"w\.nii\.gz: not readable as a displacement field; check that the file is complete and has the right ending",
    ),
    "damaged vectors": (
        _truncated,
        "w.nii.gz",
        r"w\.nii\.gz: not readable as a displacement field; check that the file is complete and has the right ending",
    ),
    "other folder": (
        lambda folder: (folder / "f").mkdir(),
        "f",
        r"f: no affine\.tfm in this folder; expected a transform folder \(the folder 'transform' of a result made with",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_transform(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, file, message = BAD[name]
    make(tmp_path)
    capfd.readouterr()
    with pytest.raises(InputError, match=message) as caught:
        read_transform(tmp_path / file)
    assert str(caught.value).startswith(str(tmp_path / file))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # ITK says nothing of its own


def test_sheared_displacement_image(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6, 1, 3), np.float32), SHEARED)
    image.header["intent_code"] = 1007
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "w.nii.gz")
    with pytest.raises(InputError, match=r"w\.nii\.gz: (the axes of the field are not at right angles|not readable)"):
        read_transform(tmp_path / "w.nii.gz")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tfm").write_text("x")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"a\.tfm: cannot be opened \(Permission denied\); check the permissions"):
        read_transform(tmp_path / "a.tfm")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "AtlasSegFM transform", "version": 2}'])
def test_bad_note(written: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "affine.tfm").write_bytes((written / "affine.tfm").read_bytes())
    (tmp_path / "transform.json").write_text(content)
    with pytest.raises(InputError, match=r"transform\.json: not a note of a transform as this version writes it; copy"):
        read_transform(tmp_path)


def test_files_of_different_transforms(written: Path, tmp_path: Path) -> None:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sitk.WriteImage(field_image(FIELD), str(tmp_path / "field.nii.gz"))
    with pytest.raises(InputError, match=r"field\.nii\.gz: 4 x 5 x 6 voxels of .* but transform\.json speaks of"):
        read_transform(tmp_path)
    for name in ("field.nii.gz", "local.nii.gz"):
        (tmp_path / "field.nii.gz").write_bytes((written / "field.nii.gz").read_bytes())
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=rf"{name}: no such file, but transform\.json speaks of it; copy it again"):
            read_transform(tmp_path)
    note = json.loads((tmp_path / "transform.json").read_text())
    del note["fields"]["local.nii.gz"]
    (tmp_path / "transform.json").write_text(json.dumps(note))
    read_transform(tmp_path)
    (tmp_path / "local.nii.gz").write_bytes((written / "local.nii.gz").read_bytes())
    with pytest.raises(InputError, match=r"local\.nii\.gz: transform\.json does not list this file"):
        read_transform(tmp_path)
    note["fields"]["field.nii.gz"]["margin_after"] = [-1, 0, 0]
    (tmp_path / "transform.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match=r"transform\.json: not a note of a transform"):
        read_transform(tmp_path)


# --- instead of registering

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
FEW_STEPS = (
    *("--set", "registration.instance.iterations=[6, 6, 6]", "--set", "registration.instance.local_voxels=20000"),
    *(
        "--set",
        "registration.instance.level_voxels=[2000, 6000]",
        "--set",
        "registration.instance.voxels_per_structure=0",
    ),
)
ATLAS_ARGUMENTS = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "--model", "none")


def made_up(scan: Volume) -> Registration:
    """About where the atlas lies in the query, by a linear part and two fields on nodes of their own."""
    nodes = straight(scan.grid)
    shift = affine_of(rotation(1, -2, 1.5) / 1.05, (-1.5, 2.0, -1.0))
    seed = int(abs(scan.data).sum()) % 1000
    return Registration(Affine(shift), smooth_field(nodes, 1.5, seed), local_field(scan.grid, seed))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an atlas, its labels, two queries and their results, the transforms kept."""
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    turned = Grid(GRID.shape, affine_of(rotation(9, 5, -7) @ np.diag([-4.0, -4.0, 4.0]), (41.0, 33.0, -30.0)))
    save_volume(QUERY.scan(turned), tmp_path / "query.nii.gz")
    save_volume(QUERY.scan(GRID), tmp_path / "other.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_simpleitk(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms are written all the same; what needs SimpleITK says so before anything is registered."""
    save_volume(QUERY.scan(GRID), folder / "query.nrrd")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    write_transform(folder / "t", LINEAR, FIELD, VIEW)
    query = ("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out")
    for arguments, extra in {
        (*query, "--transform", "t"): "itk",
        (*query, "--format", "nifti,seg.nrrd"): "itk",
        ("segment", "--atlas", "query.nrrd", *ATLAS_ARGUMENTS[2:], "query.nii.gz", "-o", "out"): "itk",
        ("convert", "labels.nii.gz", "-o", "labels.mha"): "itk",
        ("serve", "--review-only", "--scans", ".", "-o", "out"): "server",
    }.items():
        outcome = run(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert f"needs the extra '{extra}'" in outcome.err, arguments
    assert not {path.name for path in folder.iterdir()} & {"out", "labels.mha"}


@pytest.fixture
def kept(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of both queries; from now on nothing can be registered."""
    monkeypatch.setattr(method, "register_all", lambda fixed, *_, **__: [made_up(fixed)])
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "other.nii.gz", "-o", "kept", "--keep")
    assert outcome.code == 0, outcome.err

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("there was a transform")

    monkeypatch.setattr(method, "register_all", refuse)
    return folder / "kept"


def mask(path: Path) -> np.ndarray:
    data: np.ndarray = load_labels(path / "segmentation.nii.gz").data
    assert data.any()
    return data


def test_a_kept_transform_gives_the_same_mask(kept: Path, run: Run) -> None:
    assert {path.name for path in (kept / "query/transform").iterdir()} == FILES
    outcome = run(
        *("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "again", "--transform", "kept/query/transform"), "--json"
    )
    assert outcome.code == 0, outcome.err
    np.testing.assert_array_equal(mask(Path("again/query")), mask(kept / "query"))
    content = json.loads(Path("again/query/run.json").read_text())
    assert content["registration"]["source"] == "given"
    assert content["registration"]["confidence"] > 0.3
    assert content["registration"]["folding"] == pytest.approx(0, abs=0.5)
    assert content["registration"]["jacobian"].keys() == {
        *("folding", "minimum", "percentile_1", "percentile_5", "median", "percentile_95", "percentile_99"),
        "log_deviation",
    }
    assert content["inputs"]["transform"]["file"] == "transform"
    spent = json.loads(Path("again/query/status.json").read_text())["seconds"]
    assert set(spent) == {"registration", "warping", "fusion", "quality"}
    fitted = json.loads((kept / "query/run.json").read_text())
    assert fitted["registration"]["source"] == "fitted"
    assert fitted["inputs"]["transform"] is None
    # The made-up registration has not compared the scans; one with a given transform does.
    for one, other in zip(content["structures"], fitted["structures"], strict=True):
        assert one.pop("quality")["evidence"]["dissimilarity"] > 0
        assert other.pop("quality")["evidence"]["dissimilarity"] == 0
        assert one == other


def test_a_fitted_transform_gives_the_same_mask(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble of two members with local fields, registered in few steps on an oblique anisotropic query."""
    shape = (28, 24, 10)
    spacing = np.array([96.0, 80.0, 72.0]) / shape
    axes = rotation(9, 5, -7) @ np.diag(spacing * (-1, -1, 1))
    centred = affine_of(axes, tuple(-axes @ (np.array(shape) / 2)))
    save_volume(QUERY.scan(Grid(shape, centred)), folder / "query.nii.gz")
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "kept", "--keep", *FEW_STEPS)
    assert outcome.code == 0, outcome.err
    transform = Path("kept/query/transform")
    assert {path.name for path in transform.iterdir()} == FILES | {"fit_2"}
    assert {path.name for path in (transform / "fit_2").iterdir()} == FILES
    assert np.abs(nib.load(transform / "local.nii.gz").dataobj).max() > 0.1
    monkeypatch.delattr(method, "register_all")
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "again", "--transform", transform, "--keep")
    assert outcome.code == 0, outcome.err
    np.testing.assert_array_equal(mask(Path("again/query")), mask(Path("kept/query")))
    for name in (*FILES, *(f"fit_2/{name}" for name in FILES)):
        assert (Path("again/query/transform") / name).read_bytes() == (transform / name).read_bytes()
    probability = [nib.load(f"{out}/query/probability.nii.gz").get_fdata() for out in ("kept", "again")]
    np.testing.assert_array_equal(*probability)
    for out in ("kept", "again"):
        content = json.loads(Path(f"{out}/query/run.json").read_text())["registration"]
        assert content["members"] == 2
        assert content["jacobian"]["folding"] == content["folding"] == 0
        assert 0.2 < content["jacobian"]["percentile_1"] < content["jacobian"]["median"] < 2


def test_a_folder_of_results_serves_several_queries(kept: Path, run: Run) -> None:
    outcome = run(
        *("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "other.nii.gz", "-o", "again", "--transform", "kept", "--keep")
    )
    assert outcome.code == 0, outcome.err
    for name in ("query", "other"):
        np.testing.assert_array_equal(mask(Path("again") / name), mask(kept / name))
        for file in FILES:
            one, two = ((place / name / "transform" / file).read_bytes() for place in (kept, Path("again")))
            assert one == two


def test_one_file_of_another_program(kept: Path, run: Run) -> None:
    """The same map as one HDF5 file."""
    sitk.WriteTransform(sitk_of(kept / "other/transform"), "mine.h5")
    outcome = run(*("segment", *ATLAS_ARGUMENTS, "other.nii.gz", "-o", "again", "--transform", "mine.h5"), "--json")
    assert outcome.code == 0, outcome.err
    assert (mask(Path("again/other")) == mask(kept / "other")).mean() > 0.999
    assert outcome.json["results"][0]["inputs"]["transform"] == {"file": "mine.h5", "notes": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["query.nii.gz", "other.nii.gz", "--transform", "kept/query/transform"],
            "kept/query/transform: one transform for 2 queries, and each needs its own; give one query, or a folder of "
            "results made with --keep",
        ),
        (
            ["query.nii.gz", "--transform", "absent.tfm"],
            "absent.tfm: no such file or folder; expected a saved transform",
        ),
        (
            ["atlas.nii.gz", "query.nii.gz", "--transform", "kept"],
            "kept: no transform for atlas.nii.gz; expected kept/atlas/transform (in a folder of results made with "
            "--keep), or give a transform folder or file",
        ),
        (
            ["query.nii.gz", "--transform", "query.nii.gz"],
            "query.nii.gz: 3 dimensions (24 x 20 x 18) and 1 numbers a voxel; expected a displacement field",
        ),
        (
            ["query.nii.gz", "--transform", "far.tfm"],
            "query.nii.gz: the transform maps no point of the query into the atlas; expected one from query points to "
            "atlas points: check that it belongs to these two scans and is not the inverse",
        ),
        (
            ["query.nii.gz", "--transform", "flat.tfm"],
            "query.nii.gz: flat.tfm: the affine presses space flat; expected a map that can be undone",
        ),
    ],
)
def test_transforms_that_cannot_be_used(kept: Path, run: Run, arguments: list[str], message: str) -> None:
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, 0.0, 5000.0)), "far.tfm")
    sitk.WriteTransform(sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 1e-9], [0, 0, 0]), "flat.tfm")
    outcome = run("segment", *ATLAS_ARGUMENTS, *arguments, "-o", "again", "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(Path().glob("again/*/run.json"))


def test_the_transform_is_not_overwritten(kept: Path, run: Run) -> None:
    for saved in ("kept", "kept/query/transform"):
        outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "kept", "--transform", saved)
        assert outcome.code == 2
        assert outcome.err.startswith(
            "error: kept/query/transform: would be overwritten, as the result of query.nii.gz goes to kept/query"
        ), outcome.err


def test_one_bad_transform_of_several(kept: Path, run: Run) -> None:
    (kept / "other/transform/affine.tfm").write_text("damaged")
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "other.nii.gz", "-o", "again", "--transform", "kept")
    assert outcome.code == 1
    assert "error: other.nii.gz: kept/other/transform/affine.tfm: not readable as a transform of ITK" in outcome.err
    assert Path("again/query/segmentation.nii.gz").exists()


def test_given_transform_replaces_registration(folder: Path, run: Run) -> None:
    write_transform(folder / "mine", Affine(affine_of(np.eye(3) / 1.05, (-1.5, 2.0, -1.0))), None, GRID)
    outcome = run(
        *("segment", *ATLAS_ARGUMENTS, "--model", "builtin", "other.nii.gz", "-o", "out", *FAST),
        *("--transform", "mine", "--json"),
    )
    assert outcome.code == 0, outcome.err
    content = outcome.json["results"][0]
    assert set(content["seconds"]) == {"registration", "warping", "model", "gate", "fusion", "quality"}
    assert content["gate"] is not None
    assert content["registration"]["folding"] == 0
    assert content["registration"]["jacobian"] is None


@pytest.mark.parametrize("order", ["field alone", "affine first"])
def test_transforms_in_other_orders(order: str) -> None:
    """They are sampled at the query's voxels: the same mask, and the linear part says what is out of view."""
    atlas = Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)
    moved = Affine(affine_of(rotation(2, 0, -3), (35.0, -20.0, 12.0)))
    grid = Grid(GRID.shape, moved.inverse().matrix @ GRID.affine)
    query = Volume(ATLAS.scan(GRID).data, grid)
    field = smooth_field(straight(GRID), 1.5)
    chain = Chain((moved, field))
    transform: Transform = chain if order == "affine first" else displacement_on(chain, grid)
    context = Context(atlas, with_overrides(Settings(), ["model=none"]))
    result = segment(context, query, transforms=[transform])
    assert result.transform_given
    assert [one.status for one in result.structures] == ["present"] * 3
    assert [one.outside_fraction for one in result.structures] == pytest.approx([0, 0, 0], abs=0.02)
    expected = warp_labels(atlas.labels, atlas.values, grid, chain)
    for value, one in result.probabilities.items():
        np.testing.assert_allclose(
            one.atlas.to_full(result.grid.shape),
            Volume(expected[value].to_full(grid.shape), grid).turned_to(result.grid).data,
            atol=2e-3,
        )
