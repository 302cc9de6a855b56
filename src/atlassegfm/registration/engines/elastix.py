"""Run elastix (itk-elastix).

Its maps are LPS, fixed to moving, the linear stages before the B-spline; so its field is taken as a whole.
Runs inside the process of :mod:`.external_process`, which describes ``register`` and what may be imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: "itk" alone is the toolkit without elastix.
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

    options, query, atlas = request["options"], image(fixed), image(moving)

    def parameters(kind: str) -> Any:
        final_mm = options["grid_voxels"] * float(fixed.spacing.min())
        defaults = itk.ParameterObject.New().GetDefaultParameterMap(kind, options["resolutions"], final_mm)
        centred = kind != "bspline" and request["rigid"]
        return {
            **defaults,
            "MaximumNumberOfIterations": [str(options["iterations"])],
            "NumberOfSpatialSamples": [str(options["samples"])],
            "RandomSeed": [str(request["seed"])],
            "AutomaticTransformInitialization": ["true" if centred else "false"],
            "AutomaticTransformInitializationMethod": ["GeometricalCenter"],
            # Where the field of view ends, samples are few; elastix gives up at a quarter of those asked for.
            "RequiredRatioOfValidSamples": ["0.05"],
            "ResampleInterpolator": ["FinalLinearInterpolator"],
        }

    def object_of(maps: list[Any]) -> Any:
        made = itk.ParameterObject.New()
        for one in maps:
            made.AddParameterMap(one)
        return made

    def run(kind: str, before: list[Any]) -> list[Any]:
        engine = itk.ElastixRegistrationMethod.New(query, atlas)
        engine.SetParameterObject(object_of([parameters(kind)]))
        engine.SetNumberOfThreads(request["threads"])
        engine.SetLogToConsole(False)
        if before:
            engine.SetInitialTransformParameterObject(object_of(before))
        engine.UpdateLargestPossibleRegion()
        found = engine.GetTransformParameterObject()
        return [*before, dict(found.GetParameterMap(found.GetNumberOfParameterMaps() - 1))]

    def displacements(maps: list[Any]) -> Any:
        engine = itk.TransformixFilter.New(atlas)
        engine.SetTransformParameterObject(object_of(maps))
        engine.SetComputeDeformationField(True)
        engine.UpdateLargestPossibleRegion()
        return fixed.to_ras(np.transpose(itk.array_from_image(engine.GetOutputDeformationField()), (2, 1, 0, 3)))

    linear, maps = given, [] if given is None else [_affine_map(fixed, given)]
    if given is None:
        for name in ("rigid", "affine"):
            if request[name]:
                maps = run(name, maps)
        linear = _fitted_matrix(fixed, displacements(maps))
    displacement, count = None, 0
    if request["deformable"]:
        maps = run("bspline", maps)
        count = int(maps[-1]["NumberOfParameters"][0])
        back, nodes = np.linalg.inv(linear), fixed.nodes()
        displacement = np.einsum("ab,bijk->aijk", back[:3, :3], nodes + displacements(maps))
        displacement = displacement + back[:3, 3][:, None, None, None] - nodes
    return linear, displacement, count


def _fitted_matrix(fixed: Any, displacement: Any) -> Any:
    """(4, 4) matrix that moves the voxels as a displacement, (3, I, J, K), that is known to be linear."""
    step = np.maximum(np.array(fixed.data.shape) // 8, 1)
    few = (slice(None), *(slice(None, None, n) for n in step))
    points = fixed.nodes()[few].reshape(3, -1).T
    moved = points + displacement[few].reshape(3, -1).T
    centre = points.mean(axis=0)
    solution = np.linalg.lstsq(np.c_[points - centre, np.ones(len(points))], moved, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = solution[:3].T, solution[3] - solution[:3].T @ centre
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
        "UseDirectionCosines": ["true"],
        "Size": [str(n) for n in fixed.data.shape],
        "Index": ["0", "0", "0"],
        "Spacing": text(fixed.spacing),
        "Origin": text(fixed.origin),
        "Direction": text(fixed.direction.T),  # in columns: ITK reads it transposed
    }
