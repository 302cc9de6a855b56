"""Run ANTs (antspyx).

Its matrices are LPS about a centre, fixed to moving; its warp LPS, on the fixed grid, applied before the matrices.
Runs inside the process of :mod:`.external_process`, which describes ``register`` and what may be imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MODULES = ("ants",)


def register(fixed: Any, moving: Any, given: Any, request: dict[str, Any]) -> tuple[Any, Any, int]:
    """Register one pair by ANTs."""
    import ants

    def image(one: Any) -> Any:
        geometry = {"origin": one.origin.tolist(), "spacing": one.spacing.tolist(), "direction": one.direction}
        return ants.from_numpy(np.asarray(one.data, dtype=np.float32), **geometry)

    options = request["options"]

    def run(kind: str, prefix: str, initial: Any) -> list[str]:
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

    query, atlas = image(fixed), image(moving)
    transforms: list[str] = []
    if given is not None:
        lps = fixed.flip(given)
        ants.write_transform(ants.create_ants_transform(matrix=lps[:3, :3], offset=lps[:3, 3]), "given.mat")
        transforms = run("SyNOnly", "syn_", ["given.mat"])
    elif request["deformable"] and request["affine"]:
        transforms = run("SyNRA" if request["rigid"] else "SyN", "all_", None)
    else:
        for name in ("rigid", "affine"):
            if request[name]:
                transforms = run(name.capitalize(), f"{name}_", transforms or None)
        if request["deformable"]:
            transforms = run("SyNOnly", "syn_", transforms)
    linear, displacement = np.eye(4), None
    for name in transforms:
        if name.endswith(".mat"):
            found = ants.read_transform(name)
            lps, centre = np.eye(4), np.array(found.fixed_parameters)
            lps[:3, :3] = np.array(found.parameters)[:9].reshape(3, 3)
            lps[:3, 3] = np.array(found.parameters)[9:12] + centre - lps[:3, :3] @ centre
            linear = fixed.flip(lps) @ linear  # points go through the list from first to last
        else:
            displacement = fixed.to_ras(ants.image_read(name).numpy())
    return linear, displacement, 3 * fixed.data.size
