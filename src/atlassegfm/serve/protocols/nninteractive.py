"""The protocol of nnInteractive's server, for 3D Slicer and napari: our models answer, and the atlas is known.

A client takes a place, sends a scan as an array, and prompts one structure at a time; each answer is the box that
changed. The protocol has no names: a scan of the cases is recognised by its voxels. Nothing that happens here changes a
result.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, HTTPException, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from ...core.errors import InputError
from ...core.geometry import Grid
from ...core.image import Volume
from ..app import Desk
from .canvas import Box, Canvas
from .catalogue import Catalogue
from .leases import FullError, GoneError, Lease, Leases
from .models import Models

logger = logging.getLogger(__name__)

#: Version of the protocol, as its own server says it.
_VERSION = "2.6.0"
#: Voxels of an array at most: as float32, 2 GB.
_MOST_VOXELS = 500_000_000
#: Prompts that wait for a prediction at most.
_MOST_PENDING = 100
_TYPES = frozenset({"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64"})
_TYPES |= {"float16", "float32", "float64"}
_POSITIVE_NEGATIVE = {"bbox2d": [1, 2], "bbox3d": [1, 2], "lasso": [1, 2], "points": [3, 4], "scribble": [5, 6]}
CAPABILITIES: dict[str, Any] = {
    "supported_interactions": dict.fromkeys(("points", "bbox2d", "bbox3d", "lasso", "scribble"), True),
    "channel_mapping": {"prev_seg": 0, **_POSITIVE_NEGATIVE},
    "num_interaction_channels": 7,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": False,
    "preferred_scribble_thickness": 2,
    "interaction_decay": 1.0,
    "patch_size": [192, 192, 192],
    "do_autozoom": True,
    "inference_session_version": _VERSION,
    "supports_undo": True,
}

Place = Annotated[int, Field(ge=0, le=1_000_000)]
Side = tuple[Place, Place]
#: A place as a client computes it, which is rounded.
Coordinate = Annotated[float, Field(ge=-1_000_000, le=1_000_000, allow_inf_nan=False)]


class _Prompt(BaseModel):
    include_interaction: bool = True
    run_prediction: bool = True


class Point(_Prompt):
    """A voxel."""

    coordinates: tuple[Coordinate, Coordinate, Coordinate]


class Bounds(_Prompt):
    """A box: first and one past the last voxel along each axis; it may reach out of the scan."""

    bbox_coords: tuple[tuple[Coordinate, Coordinate], tuple[Coordinate, Coordinate], tuple[Coordinate, Coordinate]]


class Drawn(_Prompt):
    """A mask of the whole scan, or of a box of it."""

    interaction_bbox: tuple[Side, Side, Side] | None = None


class Buffer(BaseModel):
    """Where the client keeps the mask."""

    shape: tuple[Place, Place, Place]
    dtype: str = "uint8"


class Meta(BaseModel):
    """What comes with a scan."""

    image_properties: dict[str, Any] = Field(default_factory=dict)


#: A prompt that waits to be answered.
_Wanted = Callable[[Canvas], Box | None]


@dataclass
class Desktop:
    """What a client has at its place."""

    canvas: Canvas
    pending: list[_Wanted] = field(default_factory=list)


async def _array(request: Request) -> bytes:
    return await request.body()


Packed = Annotated[bytes, Depends(_array)]
Token = Annotated[str, Header(alias="x-lease-token")]
XMeta = Annotated[str, Header(alias="x-meta")]


def router_of(desk: Desk, catalogue: Catalogue, leases: Leases[Desktop] | None = None) -> APIRouter:
    """Make the routes of the protocol."""
    router, places, models = APIRouter(), Leases[Desktop]() if leases is None else leases, Models(desk)
    _serve_places(router, places, models)
    _serve_scans(router, places, models, catalogue)
    _serve_prompts(router, places)
    return router


def _serve_places(router: APIRouter, places: Leases[Desktop], models: Models) -> None:
    # Not one of these waits for a thread: they are answered while predictions run.
    @router.get("/healthz")
    async def healthz() -> dict[str, bool]:
        """Say that the server is there."""
        return {"ok": True}

    @router.post("/claim")
    async def claim() -> dict[str, Any]:
        """Take a place."""
        try:
            token = places.claim()
        except FullError:
            detail = f"all {places.most} places are taken; try again later"
            raise HTTPException(503, detail, {"retry-after": "30"}) from None
        return {
            "lease_token": token,
            "idle_timeout_seconds": places.idle_seconds,
            "liveness_timeout_seconds": places.silent_seconds,
            "max_sessions": places.most,
        }

    @router.get("/capabilities")
    async def capabilities(x_lease_token: Token = "") -> dict[str, Any]:
        """Say which prompts are answered."""
        _place(places, x_lease_token)
        return CAPABILITIES | {"license": models.licence()}

    @router.post("/heartbeat")
    async def heartbeat(x_lease_token: Token = "") -> dict[str, float]:
        """Take note that a client is there."""
        _place(places, x_lease_token)
        return {"remaining_seconds": places.remaining_seconds(x_lease_token)}

    @router.get("/lease_status")
    async def status(x_lease_token: Token = "") -> dict[str, float]:
        """Say how long a place stays."""
        _place(places, x_lease_token)
        remaining = places.remaining_seconds(x_lease_token)
        return {"remaining_seconds": remaining, "idle_timeout_seconds": places.idle_seconds}

    @router.post("/release")
    async def release(x_lease_token: Token = "") -> dict[str, bool]:
        """Give a place back."""
        places.release(x_lease_token)
        return {"released": True}


def _place(places: Leases[Desktop], token: str, *, acts: bool = False) -> Lease[Desktop]:
    try:
        return places.get(token, acts=acts)
    except GoneError:
        raise HTTPException(410, "the session has ended; connect again") from None


@contextmanager
def _working(places: Leases[Desktop], token: str) -> Iterator[Lease[Desktop]]:
    """Work at a place, one request after the other."""
    lease = _place(places, token, acts=True)
    places.begin(lease)
    try:
        with lease.lock:
            yield lease
    finally:
        places.end(lease)


@contextmanager
def _drawing(places: Leases[Desktop], token: str) -> Iterator[Desktop]:
    """Work on the scan of a place; 400 if there is none, or the request does not fit it."""
    with _working(places, token) as lease:
        if lease.content is None:
            raise HTTPException(400, "send a scan first")
        try:
            yield lease.content
        except ValueError as error:
            raise HTTPException(400, str(error)) from None


def _serve_scans(router: APIRouter, places: Leases[Desktop], models: Models, catalogue: Catalogue) -> None:
    @router.post("/set_image")
    def set_image(body: Packed, x_lease_token: Token = "", x_meta: XMeta = "{}") -> dict[str, Any]:
        """Take a scan, which is recognised if it is one of a case."""
        with _working(places, x_lease_token) as lease:
            meta = _meta(Meta, x_meta)
            array = _unpacked(body, 4)
            if array.shape[0] != 1:
                raise HTTPException(400, f"the scan has {array.shape[0]} channels; expected one")
            lease.content = None  # frees its memory before the next is made
            lease.content = Desktop(_canvas(array[0], meta.image_properties, models, catalogue))
            return {"original_image_shape": list(array.shape)}

    @router.post("/set_target_buffer")
    def set_target_buffer(body: Buffer, x_lease_token: Token = "") -> dict[str, Any]:
        """Begin a structure, with an empty mask."""
        with _drawing(places, x_lease_token) as desktop:
            shape = desktop.canvas.mask.shape
            if body.shape != shape:
                raise ValueError(f"the mask has the shape {body.shape}; expected that of the scan, {shape}")
            if body.dtype not in _TYPES:
                raise ValueError("the mask has a type that holds no numbers")
            _begin(desktop)
            return {}

    @router.post("/reset_interactions")
    def reset(x_lease_token: Token = "") -> dict[str, Any]:
        """Begin a structure, with an empty mask."""
        with _drawing(places, x_lease_token) as desktop:
            _begin(desktop)
            return {}

    @router.post("/set_do_autozoom")
    def set_do_autozoom(x_lease_token: Token = "") -> dict[str, Any]:
        """Take note: the model chooses by itself how far it looks."""
        _place(places, x_lease_token, acts=True)
        return {}


def _begin(desktop: Desktop) -> None:
    desktop.pending.clear()
    desktop.canvas.reset()


def _canvas(data: NDArray[Any], properties: dict[str, Any], models: Models, catalogue: Catalogue) -> Canvas:
    scan = np.ascontiguousarray(data, np.float32)
    valid = np.isfinite(scan)
    if not valid.all():
        scan = np.where(valid, scan, scan[valid].min(initial=0.0)).astype(np.float32)
    found = catalogue.recognise(scan)
    known: list[NDArray[Any]] = []
    if found is None:
        spacing = properties.get("spacing", [1.0, 1.0, 1.0])
    else:
        spacing = found.session.grid.spacing_mm[list(found.turn.axes)].tolist()
        with found.session.lock:
            sources = (found.session.numbers, *map(found.session.source, found.session.sources))
            known = [np.ascontiguousarray(found.turn.apply(one)) for one in sources if one is not None]
    logger.info("nnInteractive: a scan of %s voxels, %s", scan.shape, "of a case" if known else "free")
    try:
        sizes = [abs(float(n)) for n in spacing]
        if len(sizes) != 3 or not all(0 < n < math.inf for n in sizes):
            raise ValueError
        grid = Grid((scan.shape[0], scan.shape[1], scan.shape[2]), np.diag([*sizes, 1.0]))
    except (TypeError, ValueError, InputError):
        raise HTTPException(400, "the spacing is not three sizes in mm") from None
    return Canvas(Volume(scan, grid), models.desk.model, known, models.chosen())


def _serve_prompts(router: APIRouter, places: Leases[Desktop]) -> None:
    @router.post("/add_point_interaction")
    def point(body: Point, x_lease_token: Token = "") -> Response:
        """Answer a point."""
        with _drawing(places, x_lease_token) as desktop:
            shape, (i, j, k) = desktop.canvas.mask.shape, map(round, body.coordinates)
            ijk = i, j, k
            if not all(0 <= n < size for n, size in zip(ijk, shape, strict=True)):
                raise ValueError(f"{list(ijk)} is no voxel of a scan of {shape}")
            return _prompted(desktop, body, lambda canvas: canvas.point(ijk, body.include_interaction))

    @router.post("/add_bbox_interaction")
    def box(body: Bounds, x_lease_token: Token = "") -> Response:
        """Answer a box."""
        with _drawing(places, x_lease_token) as desktop:
            shape = desktop.canvas.mask.shape
            rounded = (map(round, side) for side in body.bbox_coords)
            x, y, z = ((max(low, 0), min(high, n)) for (low, high), n in zip(rounded, shape, strict=True))
            start, stop = _corners((x, y, z), shape)
            return _prompted(desktop, body, lambda canvas: canvas.box(start, stop, body.include_interaction))

    @router.post("/add_scribble_interaction")
    def scribble(body: Packed, x_lease_token: Token = "", x_meta: XMeta = "{}") -> Response:
        """Answer a scribble."""
        with _drawing(places, x_lease_token) as desktop:
            said = _meta(Drawn, x_meta)
            region = _region(body, said, desktop)
            return _prompted(desktop, said, lambda canvas: canvas.scribble(region, said.include_interaction))

    @router.post("/add_lasso_interaction")
    def lasso(body: Packed, x_lease_token: Token = "", x_meta: XMeta = "{}") -> Response:
        """Answer a lasso."""
        with _drawing(places, x_lease_token) as desktop:
            said = _meta(Drawn, x_meta)
            region = _region(body, said, desktop)
            return _prompted(desktop, said, lambda canvas: canvas.lasso(region, said.include_interaction))

    @router.post("/add_initial_seg_interaction")
    def seed(body: Packed, x_lease_token: Token = "") -> Response:
        """Begin a structure with a mask, which the client has in its own buffer already."""
        with _drawing(places, x_lease_token) as desktop:
            region = _region(body, Drawn(), desktop)
            desktop.pending.clear()
            desktop.canvas.seed(region)
            return _answer(desktop, False, None)

    @router.post("/predict")
    def predict(x_lease_token: Token = "") -> Response:
        """Answer the prompts that wait."""
        with _drawing(places, x_lease_token) as desktop:
            return _answer(desktop, bool(desktop.pending), _run(desktop))

    @router.post("/undo")
    def undo(x_lease_token: Token = "") -> Response:
        """Take the last prompt back."""
        with _drawing(places, x_lease_token) as desktop:
            if desktop.pending:
                desktop.pending.pop()
                return _answer(desktop, True, None)
            return _answer(desktop, *desktop.canvas.undo())


def _prompted(desktop: Desktop, body: _Prompt, wanted: _Wanted) -> Response:
    if len(desktop.pending) >= _MOST_PENDING:
        raise ValueError(f"more than {_MOST_PENDING} prompts wait; predict first")
    desktop.pending.append(wanted)
    return _answer(desktop, body.run_prediction, _run(desktop) if body.run_prediction else None)


def _run(desktop: Desktop) -> Box | None:
    """Answer the prompts that wait, and give the box around all that changed."""
    boxes = []
    while desktop.pending:
        changed = desktop.pending.pop(0)(desktop.canvas)
        boxes += [] if changed is None else [changed]
    if not boxes:
        return None
    low, high = np.array(boxes).min(axis=0)[:, 0].tolist(), np.array(boxes).max(axis=0)[:, 1].tolist()
    return (low[0], high[0]), (low[1], high[1]), (low[2], high[2])


def _answer(desktop: Desktop, ran: bool, box: Box | None) -> Response:
    from nnInteractive.inference.remote.serialization import pack_array

    part = np.zeros((0, 0, 0), np.uint8) if box is None else _cut(desktop.canvas.mask, box)
    meta = {"ran_prediction": ran, "bbox": box, "dtype": "uint8", "shape": list(part.shape)}
    body = b"" if box is None else pack_array(part, nthreads=1)
    return Response(body, media_type="application/octet-stream", headers={"x-meta": json.dumps(meta)})


def _cut(mask: NDArray[np.bool_], box: Box) -> NDArray[np.uint8]:
    return np.ascontiguousarray(mask[tuple(slice(*side) for side in box)]).view(np.uint8)


def _meta(kind: type[Any], text: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except ValueError:
        raise HTTPException(400, "the header X-Meta is not as expected") from None


def _corners(
    sides: tuple[Side, Side, Side], shape: tuple[int, ...]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    if any(not low < high <= size for (low, high), size in zip(sides, shape, strict=True)):
        raise ValueError(f"{[list(side) for side in sides]} is no box of a scan of {shape}")
    (a, d), (b, e), (c, f) = sides
    return (a, b, c), (d, e, f)


def _region(body: bytes, said: Drawn, desktop: Desktop) -> NDArray[np.bool_]:
    """A mask on the whole scan."""
    shape, mask = desktop.canvas.mask.shape, np.asarray(_unpacked(body, 3) != 0)
    if said.interaction_bbox is None:
        if mask.shape != shape:
            raise ValueError(f"the mask has the shape {mask.shape}; expected that of the scan, {shape}")
        return mask
    start, stop = _corners(said.interaction_bbox, shape)
    if mask.shape != tuple(b - a for a, b in zip(start, stop, strict=True)):
        raise ValueError(f"the mask has the shape {mask.shape}, other than its box")
    whole = np.zeros(shape, bool)
    whole[tuple(map(slice, start, stop))] = mask
    return whole


def _unpacked(body: bytes, axes: int) -> NDArray[Any]:
    """Unpack an array, of which the size is looked at first; 400 if it is none, 413 if it is too large."""
    from nnInteractive.inference.remote.serialization import unpack_array

    try:
        magic, _, _, count, length = struct.unpack_from("<4sBBBB", body)
        kind = body[8 : 8 + length].decode("ascii")
        shape = struct.unpack_from(f"<{count}q", body, 8 + length)
        if magic != b"NNIA" or kind not in _TYPES or count != axes or not all(n > 0 for n in shape):
            raise HTTPException(400, f"expected a packed array of {axes} axes")
        if math.prod(shape) > _MOST_VOXELS:
            raise HTTPException(413, f"the array has more than {_MOST_VOXELS} voxels")
        found: NDArray[Any] = unpack_array(body)
    except (struct.error, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise HTTPException(400, f"the packed array is damaged ({type(error).__name__})") from None
    return found
