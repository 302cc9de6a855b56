"""Run greedy (picsl_greedy).

Its matrices are RAS+, fixed to moving; its warps LPS, on the fixed grid, applied before the matrix.
Runs inside the process of :mod:`.external_process`, which describes ``register`` and what may be imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MODULES = ("picsl_greedy",)


def register(fixed: Any, moving: Any, given: Any, request: dict[str, Any]) -> tuple[Any, Any, int]:
    """Register one pair by greedy."""
    import SimpleITK as sitk
    from picsl_greedy import Greedy3D

    def image(one: Any) -> Any:
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
    linear = given
    if given is None:
        start, turn = "-ia-identity", options["search_rotation_deg"]
        if request["rigid"]:
            turn = "any" if turn >= 180 else f"{turn:g}"
            start = f"-ia-image-centers -search {options['search_tries']} {turn} {options['search_shift_mm']:g}"
        degrees = 12 if request["affine"] else 6
        engine.execute(f"{fit} -a -dof {degrees} {start} -o linear", linear=None, **images)
        linear = np.array(engine["linear"])
    # An array in the place of a file's name is taken as an image; matrices are given in files.
    np.savetxt("linear.mat", linear, fmt="%.17g")
    displacement = None
    if request["deformable"]:
        smooth = f"-s {options['update_smoothing_voxels']:g}vox {options['field_smoothing_voxels']:g}vox"
        # Saved fields are rounded to a tenth of a voxel otherwise (-wp).
        engine.execute(f"{fit} -it linear.mat {smooth} -wp 0 -o warp", warp=None, **images)
        displacement = fixed.to_ras(np.transpose(sitk.GetArrayFromImage(engine["warp"]), (2, 1, 0, 3)))
    return linear, displacement, 3 * fixed.data.size
