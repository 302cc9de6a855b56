"""Run elastix (itk-elastix).

Its maps are LPS, fixed to moving, the linear stages before the B-spline; so its field is taken as a whole.
Runs inside the process of :mod:`.external_process`, which describes the arguments of ``register``: nothing of this
package is imported, and nothing newer than Python 3.9 is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Modules that must be installed; "itk" alone is the toolkit without elastix.
MODULES = ("itk", "itk.itkElastixRegistrationMethodPython")


def register(fixed: Any, moving: Any, given: Any, request: dict[str, Any]) -> tuple[Any, Any, int]:
    """Register one pair by elastix."""
    import itk

    def image(one: Any) -> Any:
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

    def displacements(maps: list[Any]) -> Any:
        chain = itk.ParameterObject.New()
        for one in maps:
            chain.AddParameterMap(one)
        engine = itk.TransformixFilter.New(atlas)
        engine.SetTransformParameterObject(chain)
        engine.SetComputeDeformationField(True)
        engine.UpdateLargestPossibleRegion()
        field = np.transpose(itk.array_from_image(engine.GetOutputDeformationField()), (2, 1, 0, 3))
        return fixed.to_ras(field)

    maps: list[Any] = []
    if given is None:
        for name in ("rigid", "affine"):
            if request[name]:
                maps = run(name, maps)
        linear = _fitted_matrix(fixed, displacements(maps))
    else:
        linear = given
        maps = [_affine_map(fixed, given)]
    displacement, count = None, 0
    if request["deformable"]:
        maps = run("bspline", maps)
        count = int(maps[-1]["NumberOfParameters"][0])
        whole = fixed.nodes() + displacements(maps)
        back = np.linalg.inv(linear)
        displacement = np.einsum("ab,bijk->aijk", back[:3, :3], whole) + back[:3, 3][:, None, None, None]
        displacement -= fixed.nodes()
    return linear, displacement, count


def _fitted_matrix(fixed: Any, displacement: Any) -> Any:
    """(4, 4) matrix that moves the voxels as a displacement, (3, I, J, K), that is known to be linear."""
    step = np.maximum(np.array(fixed.data.shape) // 8, 1)
    few = (slice(None), *(slice(None, None, n) for n in step))
    points = fixed.nodes()[few].reshape(3, -1).T
    moved = points + displacement[few].reshape(3, -1).T
    centre = points.mean(axis=0)
    homogeneous = np.c_[points - centre, np.ones(len(points))]
    solution = np.linalg.lstsq(homogeneous, moved, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = solution[:3].T
    matrix[:3, 3] = solution[3] - matrix[:3, :3] @ centre
    return matrix


def _affine_map(fixed: Any, matrix: Any) -> dict[str, list[str]]:
    """A matrix, RAS+, as elastix' transform parameters."""
    lps = fixed.flip(matrix)

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
