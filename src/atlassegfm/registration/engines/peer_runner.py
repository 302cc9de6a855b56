"""The far side of the engines of other packages: one registration in a process of its own.

Run as a program, ``python _peer_runner.py FOLDER``, by whichever Python has the peer installed; so nothing but
numpy, the standard library and the peer is imported, and nothing newer than Python 3.9 is used. All geometry in the
files is RAS+ mm with homogeneous 4 x 4 matrices; the peers' LPS stays inside this module.

``FOLDER`` holds

- ``request.json``: ``peer``, ``threads``, ``seed``, ``rigid``, ``affine``, ``deformable``, ``linear`` (fixed to moving
  world, or null: the peer fits it), ``reslice`` (whether the peer's own warped image is wanted), ``fixed_affine``,
  ``moving_affine`` (voxel to world, axes at right angles) and ``options``, the settings of the peer;
- ``fixed.npy``, ``moving.npy``: (I, J, K) float32.

It gets ``linear.npy`` (4, 4), and where they are wanted ``displacement.npy``, (3, I, J, K) float32 on the fixed grid,
applied before ``linear``, ``resliced.npy`` and ``parameters.json`` (how many numbers each stage fitted).

``python _peer_runner.py --check PEER`` only says whether the peer can be imported. The exit code is 0 if all is
well, :data:`MISSING` if the peer is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # Python puts the folder of a program first; its neighbours here would hide other packages' modules.
    del sys.path[0]


#: Exit code where the peer is not installed.
MISSING = 3


#: What is imported for each peer, and its distribution.
MODULES = {"greedy": "picsl_greedy", "ants": "ants", "elastix": "itk"}


#: RAS+ from ITK's LPS and back.
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def main(arguments: list[str]) -> int:
    """Check for a peer or run the request of a folder; the exit code."""
    if arguments[:1] == ["--check"]:
        return 0 if _is_installed(arguments[1]) else MISSING
    folder = Path(arguments[0])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if not _is_installed(request["peer"]):
        return MISSING
    fixed = _Image(np.load(folder / "fixed.npy"), np.array(request["fixed_affine"]))
    moving = _Image(np.load(folder / "moving.npy"), np.array(request["moving_affine"]))
    given = None if request["linear"] is None else np.array(request["linear"])
    # Peers leave files where they run.
    os.chdir(folder)
    run = {"greedy": _greedy, "ants": _ants, "elastix": _elastix}[request["peer"]]
    linear, displacement, resliced, fitted = run(fixed, moving, given, request)
    if displacement is not None:
        np.save(folder / "displacement.npy", np.ascontiguousarray(displacement, dtype=np.float32))
    if resliced is not None:
        np.save(folder / "resliced.npy", np.ascontiguousarray(resliced, dtype=np.float32))
    counts = {} if given is not None else {"linear": 12 if request["affine"] else 6}
    if displacement is not None:
        counts["deformable"] = int(fitted)
    (folder / "parameters.json").write_text(json.dumps(counts), encoding="utf-8")
    # Last, and whole: its presence says that all is there.
    np.save(folder / "linear.npy", np.asarray(linear, dtype=np.float64))
    return 0


def _is_installed(peer: str) -> bool:
    module = MODULES[peer]
    if importlib.util.find_spec(module) is None:
        return False
    # "itk" alone is the toolkit without elastix.
    return peer != "elastix" or importlib.util.find_spec("itk.itkElastixRegistrationMethodPython") is not None


class _Image:
    """An array and where it is, the way ITK wants it: LPS origin, spacing and unit axes in columns."""

    def __init__(self, data: Any, affine: Any) -> None:
        self.data = data
        lps = _FLIP @ affine
        self.spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
        self.direction = lps[:3, :3] / self.spacing
        self.origin = lps[:3, 3]
        self.affine = affine


def _to_ras(lps: Any) -> Any:
    """(I, J, K, 3) displacements in LPS mm to (3, I, J, K) in RAS+ mm."""
    return np.moveaxis(np.asarray(lps, dtype=np.float64), -1, 0) * np.array([-1.0, -1.0, 1.0])[:, None, None, None]


def _greedy(fixed: _Image, moving: _Image, given: Any, request: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """Greedy: its matrices are RAS+, fixed to moving; its warps LPS, on the fixed grid, applied before the matrix."""
    import SimpleITK as sitk
    from picsl_greedy import Greedy3D

    def image(one: _Image) -> Any:
        made = sitk.GetImageFromArray(np.ascontiguousarray(one.data.T))
        made.SetSpacing(one.spacing.tolist())
        made.SetOrigin(one.origin.tolist())
        made.SetDirection(one.direction.ravel().tolist())
        return made

    options = request["options"]
    engine = Greedy3D()
    common = f"-threads {request['threads']} -seed {request['seed']}"
    fit = f"{common} -i fixed moving -m WNCC {'x'.join(3 * [str(options['metric_radius'])])} -n {options['iterations']}"
    images = {"fixed": image(fixed), "moving": image(moving)}
    linear = np.eye(4) if given is None else given
    if given is None:
        start = "-ia-identity"
        if request["rigid"]:
            turn = options["search_rotation_deg"]
            turn = "any" if turn >= 180 else f"{turn:g}"
            start = f"-ia-image-centers -search {options['search_tries']} {turn} {options['search_shift_mm']:g}"
        degrees = 12 if request["affine"] else 6
        engine.execute(f"{fit} -a -dof {degrees} {start} -o linear", linear=None, **images)
        linear = np.array(engine["linear"])
    # An array in the place of a file's name is taken as an image; matrices are given in files.
    np.savetxt("linear.mat", linear, fmt="%.17g")
    displacement, reslice = None, "linear.mat"
    if request["deformable"]:
        smooth = f"-s {options['update_smoothing_voxels']:g}vox {options['field_smoothing_voxels']:g}vox"
        # Saved fields are rounded to a tenth of a voxel otherwise (-wp).
        engine.execute(f"{fit} -it linear.mat {smooth} -wp 0 -o warp", warp=None, **images)
        displacement = _to_ras(np.transpose(sitk.GetArrayFromImage(engine["warp"]), (2, 1, 0, 3)))
        reslice = "warp linear.mat"
    resliced = None
    if request["reslice"]:
        engine.execute(f"{common} -rf fixed -rm moving resliced -r {reslice}", resliced=None, **images)
        resliced = sitk.GetArrayFromImage(engine["resliced"]).T
    return linear, displacement, resliced, 3 * fixed.data.size


def _ants(fixed: _Image, moving: _Image, given: Any, request: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """ANTs: an ITK matrix about a centre, LPS, fixed to moving; the warp on the fixed grid, applied before it."""
    import ants

    def image(one: _Image) -> Any:
        return ants.from_numpy(
            np.asarray(one.data, dtype=np.float32),
            origin=one.origin.tolist(),
            spacing=one.spacing.tolist(),
            direction=one.direction,
        )

    options = request["options"]
    query, atlas = image(fixed), image(moving)

    def register(kind: str, prefix: str, initial: Any) -> list[str]:
        result = ants.registration(
            query,
            atlas,
            type_of_transform=kind,
            initial_transform=initial,
            outprefix=prefix,
            reg_iterations=tuple(int(n) for n in options["iterations"].split("x")),
            syn_metric=options["metric"],
            # With "CC" this is the radius of the window, with "mattes" the number of bins; both antspyx' own.
            syn_sampling=4 if options["metric"] == "CC" else 32,
            grad_step=options["gradient_step"],
            flow_sigma=options["flow_sigma"],
            total_sigma=options["total_sigma"],
        )
        return list(result["fwdtransforms"])

    if given is None:
        stages = [name for name in ("rigid", "affine") if request[name]]
        if request["deformable"] and request["affine"]:
            transforms = register("SyNRA" if request["rigid"] else "SyN", "all_", None)
        else:
            transforms = []
            for name in stages:
                transforms = register(name.capitalize(), f"{name}_", transforms or None)
            if request["deformable"]:
                transforms = register("SyNOnly", "syn_", transforms)
    else:
        lps = _FLIP @ given @ _FLIP
        start = ants.create_ants_transform(
            transform_type="AffineTransform", dimension=3, matrix=lps[:3, :3], offset=lps[:3, 3]
        )
        ants.write_transform(start, "given.mat")
        transforms = register("SyNOnly", "syn_", ["given.mat"])
    linear, displacement = np.eye(4), None
    for name in transforms:
        if name.endswith(".mat"):
            found = ants.read_transform(name)
            lps, centre = np.eye(4), np.array(found.fixed_parameters)
            lps[:3, :3] = np.array(found.parameters)[:9].reshape(3, 3)
            lps[:3, 3] = np.array(found.parameters)[9:12] + centre - lps[:3, :3] @ centre
            # Points go through the list from first to last.
            linear = _FLIP @ lps @ _FLIP @ linear
        else:
            displacement = _to_ras(ants.image_read(name).numpy())
    resliced = None
    if request["reslice"]:
        resliced = ants.apply_transforms(query, atlas, transforms).numpy()
    return linear, displacement, resliced, 3 * fixed.data.size


def _elastix(fixed: _Image, moving: _Image, given: Any, request: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """Elastix: LPS, fixed to moving, the linear stages before the B-spline; so its field is taken as a whole."""
    import itk

    def image(one: _Image) -> Any:
        made = itk.image_from_array(np.ascontiguousarray(one.data.T, dtype=np.float32))
        made.SetSpacing(one.spacing.tolist())
        made.SetOrigin(one.origin.tolist())
        made.SetDirection(itk.matrix_from_array(np.ascontiguousarray(one.direction)))
        return made

    options = request["options"]
    query, atlas = image(fixed), image(moving)
    final_mm = options["grid_voxels"] * float(fixed.spacing.min())

    def parameters(kind: str) -> Any:
        made = itk.ParameterObject.New()
        table = dict(made.GetDefaultParameterMap(kind, options["resolutions"], final_mm))
        table["MaximumNumberOfIterations"] = [str(options["iterations"])]
        table["NumberOfSpatialSamples"] = [str(options["samples"])]
        table["RandomSeed"] = [str(request["seed"])]
        table["AutomaticTransformInitialization"] = ["true" if kind != "bspline" and request["rigid"] else "false"]
        table["AutomaticTransformInitializationMethod"] = ["GeometricalCenter"]
        # Where the field of view ends, samples are few; elastix gives up at a quarter of those asked for.
        table["RequiredRatioOfValidSamples"] = ["0.05"]
        table["ResampleInterpolator"] = ["FinalLinearInterpolator"]
        return table

    def run(kind: str, before: list[Any]) -> list[Any]:
        wanted = itk.ParameterObject.New()
        wanted.AddParameterMap(parameters(kind))
        engine = itk.ElastixRegistrationMethod.New(query, atlas)
        engine.SetParameterObject(wanted)
        engine.SetNumberOfThreads(request["threads"])
        engine.SetLogToConsole(False)
        if before:
            initial = itk.ParameterObject.New()
            for one in before:
                initial.AddParameterMap(one)
            engine.SetInitialTransformParameterObject(initial)
        engine.UpdateLargestPossibleRegion()
        found = engine.GetTransformParameterObject()
        return before + [dict(found.GetParameterMap(n)) for n in range(found.GetNumberOfParameterMaps())][-1:]

    def transformix(maps: list[Any]) -> tuple[Any, Any]:
        chain = itk.ParameterObject.New()
        for one in maps:
            chain.AddParameterMap(one)
        engine = itk.TransformixFilter.New(atlas)
        engine.SetTransformParameterObject(chain)
        engine.SetComputeDeformationField(True)
        engine.UpdateLargestPossibleRegion()
        field = np.transpose(itk.array_from_image(engine.GetOutputDeformationField()), (2, 1, 0, 3))
        return _to_ras(field), itk.array_from_image(engine.GetOutput()).T

    maps: list[Any] = []
    if given is None:
        for name in ("rigid", "affine"):
            if request[name]:
                maps = run(name, maps)
        linear = _fitted_matrix(fixed, transformix(maps)[0])
    else:
        linear = given
        maps = [_elastix_affine(fixed, given)]
    displacement, count = None, 0
    if request["deformable"]:
        maps = run("bspline", maps)
        count = int(maps[-1]["NumberOfParameters"][0])
        whole = _nodes(fixed) + transformix(maps)[0]
        back = np.linalg.inv(linear)
        displacement = np.einsum("ab,bijk->aijk", back[:3, :3], whole) + back[:3, 3][:, None, None, None]
        displacement -= _nodes(fixed)
    resliced = transformix(maps)[1] if request["reslice"] else None
    return linear, displacement, resliced, count


def _nodes(image: _Image) -> Any:
    """(3, I, J, K) voxel centres, RAS+ mm."""
    ijk = np.indices(image.data.shape, dtype=np.float64)
    return np.einsum("ab,bijk->aijk", image.affine[:3, :3], ijk) + image.affine[:3, 3][:, None, None, None]


def _fitted_matrix(fixed: _Image, displacement: Any) -> Any:
    """(4, 4) matrix that moves the voxels as a displacement, (3, I, J, K), that is known to be linear."""
    step = np.maximum(np.array(fixed.data.shape) // 8, 1)
    few = (slice(None), *(slice(None, None, n) for n in step))
    points = _nodes(fixed)[few].reshape(3, -1).T
    moved = points + displacement[few].reshape(3, -1).T
    centre = points.mean(axis=0)
    homogeneous = np.c_[points - centre, np.ones(len(points))]
    solution = np.linalg.lstsq(homogeneous, moved, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = solution[:3].T
    matrix[:3, 3] = solution[3] - matrix[:3, :3] @ centre
    return matrix


def _elastix_affine(fixed: _Image, matrix: Any) -> dict[str, list[str]]:
    """A matrix, RAS+, as elastix' transform parameters."""
    lps = _FLIP @ matrix @ _FLIP

    def text(values: Any) -> list[str]:
        return [f"{float(value):.17g}" for value in np.ravel(values)]

    return {
        "Transform": ["AffineTransform"],
        "NumberOfParameters": ["12"],
        "TransformParameters": text(lps[:3, :3]) + text(lps[:3, 3]),
        "CenterOfRotationPoint": ["0", "0", "0"],
        "InitialTransformParameterFileName": ["NoInitialTransform"],
        "HowToCombineTransforms": ["Compose"],
        "FixedImageDimension": ["3"],
        "MovingImageDimension": ["3"],
        "FixedInternalImagePixelType": ["float"],
        "MovingInternalImagePixelType": ["float"],
        "UseDirectionCosines": ["true"],
        "Size": [str(n) for n in fixed.data.shape],
        "Index": ["0", "0", "0"],
        "Spacing": text(fixed.spacing),
        "Origin": text(fixed.origin),
        # In columns: ITK reads it transposed.
        "Direction": text(fixed.direction.T),
        "Resampler": ["DefaultResampler"],
        "ResampleInterpolator": ["FinalLinearInterpolator"],
        "DefaultPixelValue": ["0"],
        "ResultImageFormat": ["nii"],
        "ResultImagePixelType": ["float"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
