"""The protocol of MONAI Label, for 3D Slicer, OHIF and scripts.

A sample is a case. Its result is there at once, as the label "original" and as the answer of the model; a click is
answered with one structure and changes nothing here; a label that is submitted is the result, with the structures that
it names as accepted. Paths are exact, with their slash at the end: clients follow no redirect.
"""

from __future__ import annotations

import hashlib
import random
import re
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Body, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from ...core.errors import InputError
from ...core.image import image_suffix, label_positions, label_values
from ...core.version import __version__
from ...dicom import open_image
from ...jobs.review import refresh_summary
from ..app import Desk
from ..cases import has_draft
from ..clicks import Click, Mask, answer
from ..edits import Numbers, pack, unpack
from ..session import LockedError, Session
from . import files
from .catalogue import Catalogue
from .multipart import File, Form, read_form, write_form

#: Names of the models: all structures of a result, clicks on one, and the same as OHIF asks for it.
WHOLE, CLICKS, POINTS = "atlassegfm", "correct", "correct_in_ohif"
STRATEGIES = {
    "worst_first": "what most needs eyes comes first",
    "in_order": "by name",
    "random": "in an order of chance, the same at each start",
}
#: Label that was computed, and the one that was submitted.
_ORIGINAL, _FINAL = "original", "final"
#: Clicks on a structure at most, answers to clicks and uploads that are kept.
_MOST_CLICKS, _MOST_ANSWERS, _MOST_SESSIONS = 200, 16, 100
_WAIT_SECONDS = 0.1
#: Formats of one file that 3D Slicer and napari read.
_SENT_AS_THEY_ARE = (".nii.gz", ".nii", ".nrrd", ".mha")


async def _form(request: Request) -> Form:
    """Read a form; 422 if the body is none."""
    try:
        return read_form(await request.body(), request.headers.get("content-type", ""))
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


Sent = Annotated[Form, Depends(_form)]
JsonBody = Annotated[dict[str, Any], Body()]


@dataclass(frozen=True)
class _Answered:
    """Clicks on a structure that were answered, with the labels that they began from."""

    version: tuple[int, int]
    clicks: tuple[Click, ...]
    mask: bytes


@dataclass
class _Room:
    """What requests of this protocol share."""

    desk: Desk
    catalogue: Catalogue
    handed: Counter[int] = field(default_factory=Counter)
    uploads: OrderedDict[str, int] = field(default_factory=OrderedDict)
    answered: OrderedDict[tuple[str, int, int], _Answered] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def opened(self, number: int) -> Iterator[Session]:
        """Open a case, which no other request changes meanwhile."""
        session = self.desk.cases.open(number)
        with session.lock:
            yield session

    def keep(self, store: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
        """Keep something, and forget the oldest."""
        with self.lock:
            store[key] = value
            store.move_to_end(key)
            while len(store) > most:
                store.popitem(last=False)


def router_of(desk: Desk, catalogue: Catalogue) -> APIRouter:
    """Make the routes of the protocol."""
    room, router = _Room(desk, catalogue), APIRouter()
    _serve_info(router, room)
    _serve_samples(router, room)
    _serve_labels(router, room)
    _serve_inference(router, room)
    _serve_uploads(router, room)
    return router


# What there is


def _serve_info(router: APIRouter, room: _Room) -> None:
    @router.get("/info/")
    def info() -> dict[str, Any]:
        """Name models, structures and the state of the cases."""
        names = list(room.catalogue.names())
        config = {} if room.desk.cohort is None else {"run_again": False}
        models = {
            WHOLE: ("segmentation", config, "the result of the case; computed where there is none"),
            CLICKS: ("deepgrow", {}, "clicks that grow and shrink one structure of the result"),
            # OHIF does not say which structure clicks for the type above are on.
            POINTS: ("vista3d", {}, "the same for OHIF"),
        }
        return {
            "name": "AtlasSegFM",
            "description": room.desk.title,
            "version": __version__,
            "labels": names,
            "models": {
                name: {"type": kind, "labels": names, "dimension": 3, "description": text, "config": options}
                for name, (kind, options, text) in models.items()
            },
            "trainers": {},
            "strategies": {name: {"description": text} for name, text in STRATEGIES.items()},
            "scoring": {},
            "train_stats": {},
            "datastore": _counts(room),
        }

    @router.get("/auth/")
    def auth() -> dict[str, bool]:
        """Say that no user has to log in: the address holds the token."""
        return {"enabled": False}

    @router.get("/train/")
    def train() -> Response:
        """Say that nothing is trained: clients take any other answer for a training under way."""
        return JSONResponse({"detail": "nothing is trained here; the atlas is what the program learns from"}, 404)


def _counts(room: _Room) -> dict[str, Any]:
    rows = [room.desk.cases.summary(n) for n in range(len(room.desk.cases.entries))]
    done = sum(row["state"] == "accepted" for row in rows)
    results = sum(bool(row["count"]) for row in rows)
    return {"total": len(rows), "completed": done, "label_tags": {_ORIGINAL: results, _FINAL: done}}


def _serve_samples(router: APIRouter, room: _Room) -> None:
    @router.post("/activelearning/{strategy}")
    def sample(strategy: str, body: JsonBody | None = None) -> dict[str, Any]:  # noqa: ARG001
        """Choose the next case; nothing is chosen when all are accepted."""
        if strategy not in STRATEGIES:
            raise HTTPException(404, f"no such strategy; there are {', '.join(STRATEGIES)}")
        number = _next(room, strategy)
        if number is None:
            return {}
        entry = room.desk.cases.get(number)
        found = {"id": room.catalogue.ids[number], "name": _file_name(room, number), "path": ""}
        query = entry.case.query
        if _is_sent_as_it_is(query):
            found["checksum"] = f"SHA256:{_sha256(query, query.stat().st_mtime_ns)}"
        return found | room.catalogue.series_of(number)

    @router.api_route("/datastore/image", methods=["GET", "HEAD"])
    def image(image: str) -> Response:
        """Send the scan of a case: its file, or an NRRD file where few programs read that."""
        number = room.catalogue.find(image)
        entry = room.desk.cases.get(number)
        if not entry.has_scan:
            raise HTTPException(404, "the scan of this case was not given")
        query = entry.case.query
        content = query.read_bytes() if _is_sent_as_it_is(query) else files.nrrd(open_image(query))
        return _attached(content, _file_name(room, number))

    @router.get("/datastore/image/info")
    def image_info(image: str) -> dict[str, Any]:
        """Describe a scan."""
        return _image_info(room, room.catalogue.find(image))


def _next(room: _Room, strategy: str) -> int | None:
    """Choose among the cases that are not accepted, of those that were given out least often."""
    cases = room.desk.cases
    rows = [cases.summary(n) for n, one in enumerate(cases.entries) if one.has_scan]
    runs = room.desk.cohort is not None
    rows = [row for row in rows if row["state"] == "open" or (runs and row["state"] in ("waiting", "failed"))]
    if not rows:
        return None
    if strategy == "worst_first":
        rows.sort(key=lambda row: (row["urgency"], row["name"]))
    elif strategy == "random":
        random.Random(0).shuffle(rows)
    with room.lock:
        number = int(min(rows, key=lambda row: room.handed[row["id"]])["id"])
        room.handed[number] += 1
    return number


def _file_name(room: _Room, number: int) -> str:
    """Name a scan after its case: clients keep downloads by name, and two scans may have the same file name."""
    case = room.desk.cases.get(number).case
    return f"{case.name}{image_suffix(case.query) if _is_sent_as_it_is(case.query) else '.nrrd'}"


def _is_sent_as_it_is(query: Path) -> bool:
    return not query.is_dir() and image_suffix(query) in _SENT_AS_THEY_ARE


@lru_cache(maxsize=10_000)
def _sha256(path: Path, _stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _attached(content: bytes, name: str) -> Response:
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    headers = {"content-disposition": f'attachment; filename="{plain}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


def _image_info(room: _Room, number: int) -> dict[str, Any]:
    row = room.desk.cases.summary(number)
    return {"name": _file_name(room, number), "state": row["state"], "verdict": row["verdict"], "worst": row["worst"]}


# Labels


def _serve_labels(router: APIRouter, room: _Room) -> None:
    @router.get("/datastore/")
    def datastore(output: Literal["", "all", "stats"] = "") -> dict[str, Any]:
        """Count the cases, or list them with their labels."""
        if output != "all":
            return _counts(room)
        cases, objects, values = room.desk.cases, {}, room.catalogue.values()
        for number, image in enumerate(room.catalogue.ids):
            ext = Path(_file_name(room, number)).suffix
            labels = {tag: {"ext": ".nrrd", "info": _label_info(room, number, values)} for tag in _tags(room, number)}
            objects[image] = {"image": {"ext": ext, "info": _image_info(room, number)}, "labels": labels}
        return {"name": cases.out.resolve().name, "description": "", "objects": objects}

    @router.api_route("/datastore/label", methods=["GET", "HEAD"])
    def label(label: str, tag: str = _FINAL) -> Response:
        """Send the labels of a case: as they were computed, or as they were accepted."""
        number = room.catalogue.find(label)
        if tag not in _tags(room, number):
            raise HTTPException(404, f"the case has no label {tag!r}")
        with room.opened(number) as session:
            numbers = session.automatic if tag == _ORIGINAL else session.numbers
            values = room.catalogue.values()
            content = files.nrrd(session.as_stored(numbers, [values[one.name] for one in session.structures]))
        return _attached(content, f"{room.catalogue.ids[number]}.nrrd")

    @router.get("/datastore/label/info")
    def label_info(label: str, tag: str = _FINAL) -> dict[str, Any]:
        """Describe the labels of a case."""
        number = room.catalogue.find(label)
        if tag not in _tags(room, number):
            raise HTTPException(404, f"the case has no label {tag!r}")
        return _label_info(room, number, room.catalogue.values())

    @router.put("/datastore/label")
    def submit(image: str, form: Sent, tag: str = "") -> dict[str, Any]:
        """Take labels as the result of a case, and the structures that they name as accepted."""
        if tag not in ("", _FINAL):
            raise HTTPException(422, f"labels are kept as {_ORIGINAL!r} and {_FINAL!r} alone; send them as {_FINAL!r}")
        sent = form.files.get("label", [])
        if len(sent) != 1:
            raise HTTPException(422, "expected one file named 'label'")
        number = room.catalogue.find(image)
        accepted = _submit(room, number, sent[0], _params(form))
        identifier = room.catalogue.ids[number]
        return {"image": identifier, "label": identifier, "tag": _FINAL, "accepted": accepted}

    @router.put("/datastore/updatelabelinfo")
    def review(label: str, form: Sent, tag: str = "") -> dict[str, Any]:  # noqa: ARG001
        """Take over what a reviewer says: approved is accepted, flagged is open again."""
        number, said = room.catalogue.find(label), _params(form).get("segmentationMeta")
        if not isinstance(said, dict):
            raise HTTPException(422, "expected 'segmentationMeta' in the field 'params'")
        remark = {str(key): str(value)[:2000] for key, value in list(said.items())[:20]}
        by = _who(said.get("approvedBy"))
        _check_free(room, number)
        with room.opened(number) as session:
            session.remark(remark, by)
            every = range(1, len(session.structures) + 1)
            if remark.get("status") == "approved":
                session.accept(list(every), by)
            elif remark.get("status") == "flagged" and session.locked:
                session.reopen(list(every), by)
            refresh_summary(room.desk.cases.out)
        return _label_info(room, number, room.catalogue.values())


def _tags(room: _Room, number: int) -> list[str]:
    row = room.desk.cases.summary(number)
    if not row["count"] or not room.desk.cases.get(number).has_scan:
        return []
    return [_ORIGINAL, _FINAL] if row["state"] == "accepted" else [_ORIGINAL]


def _label_info(room: _Room, number: int, values: Mapping[str, int]) -> dict[str, Any]:
    run, remark = room.catalogue.run_of(number), room.catalogue.remark_of(number)
    rows = () if run is None else run.structures
    info: dict[str, Any] = {
        "name": room.catalogue.ids[number],
        "params": {"label_names": {one.name: values[one.name] for one in rows}},
        "verdicts": {one.name: one.quality.verdict for one in rows if one.quality is not None},
    }
    if rows and all(one.review is not None for one in rows):
        remark["status"] = "approved"
    elif remark.get("status") == "approved":
        remark["status"] = "segmented"  # opened again elsewhere
    return info | ({"segmentationMeta": remark} if remark else {})


def _params(form: Form) -> dict[str, Any]:
    try:
        return form.params
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _who(name: object) -> str:
    """Who sent something, as a line of the log takes it."""
    return "".join(one for one in str(name or "") if one.isprintable())[:80]


def _check_free(room: _Room, number: int) -> None:
    cohort = room.desk.cohort
    if cohort is not None and cohort.is_computing(room.desk.cases.get(number).case.name):
        raise HTTPException(423, "the case is being segmented; wait until that is done, or stop the run")


def _submit(room: _Room, number: int, sent: File, params: Mapping[str, Any]) -> list[str]:
    """Write the labels that were sent as the result; all is checked before anything changes."""
    _check_free(room, number)
    listed = params.get("label_info", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise HTTPException(422, "'label_info' is no list of names")
    labels = files.read_labels(sent)
    own = {name: value for name, value in room.catalogue.values().items() if name in room.catalogue.names_of(number)}
    names = files.names_by_value(labels, listed, own)
    with room.opened(number) as session:
        if labels.grid.axes_relative_to(session.stored.grid) is None:
            raise InputError("the label map is not on the voxels of the scan; export it with the scan as reference")
        places = {one.name: n for n, one in enumerate(session.structures, start=1)}
        drawn = labels.turned_to(session.grid).data
        unknown = sorted(names[n] for n in label_values(drawn) if names[n] not in places)
        if unknown:
            raise InputError(f"the label map has {', '.join(unknown)}; the structures are {', '.join(places)}")
        named = sorted({places[name] for name in names.values() if name in places})
        if not named:
            raise InputError(f"the label map names none of the structures {', '.join(places)}")
        table = np.array([0, *(places.get(name, 0) for name in names.values())], session.numbers.dtype)
        new: Numbers = np.asfortranarray(table[label_positions(drawn, list(names))])
        # What it does not name stays, where it is not drawn over.
        kept = (new == 0) & ~np.isin(session.numbers, named)
        new[kept] = session.numbers[kept]
        changed = {int(n) for one in (new, session.numbers) for n in np.unique(one[new != session.numbers])}
        for other in sorted(session.locked & changed):
            if other not in named:
                raise LockedError(session.structures[other - 1].name)
        by = _who(params.get("client_id"))
        again = sorted(session.locked & changed)
        if again:
            session.reopen(again, by)
        session.replace(new, by)
        session.accept(named, by)
        refresh_summary(room.desk.cases.out)
        return [session.structures[n - 1].name for n in named]


# Inference


def _serve_inference(router: APIRouter, room: _Room) -> None:
    @router.post("/infer/{model}")
    def infer(
        model: str,
        form: Sent,
        image: str = "",
        session_id: str = "",
        output: Literal["", "all", "image", "json"] = "",
    ) -> Response:
        """Answer with the result of a case, or with one structure after clicks."""
        if model not in (WHOLE, CLICKS, POINTS):
            raise HTTPException(404, f"no such model; there are {WHOLE}, {CLICKS} and {POINTS}")
        params = _params(form)
        if model == POINTS:
            params = _as_clicks(params, room.catalogue.names())
        if (params.get("result_extension") or ".nrrd") not in (".nrrd", "nrrd"):
            raise HTTPException(422, "results are sent as .nrrd alone")
        number = _asked(room, image, session_id, form)
        if model == WHOLE or (model == POINTS and "label" not in params):
            if params.get("run_again") is True or room.desk.cases.summary(number)["count"] == 0:
                _segment(room, number)
            with room.opened(number) as session:
                numbers = session.numbers.copy(order="K")
            chosen = [one.name for one in session.structures]
        else:
            session, numbers = _clicked(room, number, params)
            chosen = [str(params["label"])]
        values = room.catalogue.values()
        shown = [values[one.name] for one in session.structures]
        info = {**_label_info(room, number, values), "label_names": {name: values[name] for name in chosen}}
        if output == "json":
            return JSONResponse(info)
        compress = params.get("result_compress", True) is not False
        result = files.nrrd(session.as_stored(numbers, shown), compress=compress)
        if output == "image":
            return _attached(result, "result.nrrd")
        body, kind = write_form(info, "image", File("result.nrrd", result))
        return Response(body, media_type=kind)


def _asked(room: _Room, image: str, session_id: str, form: Form) -> int:
    """Find the case that a request is about: an upload, a file that comes with it, or by name."""
    if session_id:
        with room.lock:
            if session_id not in room.uploads:
                raise HTTPException(404, "no such session")
            return room.uploads[session_id]
    if form.files.get("file"):
        return _recognised(room, form.files["file"])
    return room.catalogue.find(image)


def _segment(room: _Room, number: int) -> None:
    """Compute a case, or compute it again if it would come out otherwise now; the request waits."""
    cohort, entry = room.desk.cohort, room.desk.cases.get(number)
    if cohort is None:
        raise HTTPException(409, "the case has no result, and there is no context to compute one with")
    if not entry.has_scan:
        raise HTTPException(409, "the scan of this case was not given")
    if has_draft(room.desk.cases.folder(number)):
        raise HTTPException(409, "the case has edits that nobody accepted; accept or undo them first")
    cohort.start([entry.case])
    while cohort.state == "running":
        time.sleep(_WAIT_SECONDS)
    if cohort.state != "done" or not room.desk.cases.summary(number)["count"]:
        raise InputError(cohort.reason or room.desk.cases.summary(number)["worst"] or "the run was stopped")


def _clicked(room: _Room, number: int, params: Mapping[str, Any]) -> tuple[Session, Numbers]:
    """Numbers of one structure alone after all clicks that a request has; those answered before are not again."""
    with room.opened(number) as session:
        places = {one.name: n for n, one in enumerate(session.structures, start=1)}
        structure = places.get(str(params.get("label", "")))
        if structure is None:
            raise HTTPException(422, f"expected 'label': one of {', '.join(places)}")
        clicks = _clicks(session, params)
        taken = (session.numbers != 0) & (session.numbers != structure)
        begun = session.numbers == structure
        version = (session.version, session.stamp)
    key = (_who(params.get("client_id")), number, structure)
    with room.lock:
        known = room.answered.get(key)
    done: tuple[Click, ...] = ()
    mask: Mask = begun.copy(order="F")
    if known is not None and known.version == version and set(known.clicks) <= set(clicks):
        done, mask = known.clicks, unpack(known.mask, begun.shape, np.dtype(np.uint8)) != 0
    for click in clicks:
        if click not in done:
            patch = answer(room.desk.model, session.scan, mask, click, done)
            box = tuple(slice(a, a + n) for a, n in zip(patch.start, patch.mask.shape, strict=True))
            mask[box] = patch.mask & ~taken[box]
            done = (*done, click)
    room.keep(room.answered, key, _Answered(version, done, pack(mask.view(np.uint8))), _MOST_ANSWERS)
    return session, np.where(mask, structure, 0).astype(session.numbers.dtype)


def _as_clicks(params: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Say points as OHIF sends them as clicks; without points all structures are wanted."""
    points, kinds, values = (params.get(name) or [] for name in ("points", "point_labels", "label_prompt"))
    if not all(isinstance(one, list) for one in (points, kinds, values)) or len(points) != len(kinds):
        raise HTTPException(422, "expected 'points', a number for each in 'point_labels', and 'label_prompt'")
    others = {key: value for key, value in params.items() if key != "label"}
    if not points:
        return others
    if len(values) != 1 or not isinstance(values[0], int) or not 1 <= values[0] <= len(names):
        raise HTTPException(422, f"expected one structure in 'label_prompt', from 1 to {len(names)}")
    clicks = {
        name: [point for point, kind in zip(points, kinds, strict=True) if (kind == 1) == (name == "foreground")]
        for name in ("foreground", "background")
    }
    return {**others, "label": names[values[0] - 1], **clicks}


def _clicks(session: Session, params: Mapping[str, Any]) -> list[Click]:
    found = []
    for name, positive in (("foreground", True), ("background", False)):
        points = params.get(name) or []
        try:
            found += [Click(session.voxel_of([float(n) for n in point]), positive) for point in points]
        except (TypeError, ValueError, OverflowError) as error:
            raise HTTPException(422, f"{name!r} is no list of voxels: {error}") from None
    if len(found) > _MOST_CLICKS:
        raise HTTPException(422, f"at most {_MOST_CLICKS} clicks")
    return found


# Scans that are sent


def _serve_uploads(router: APIRouter, room: _Room) -> None:
    @router.put("/session/")
    @router.post("/session/")
    def begin(form: Sent) -> dict[str, Any]:
        """Take a scan that is open in the client: it is recognised by its voxels, and not kept."""
        number = _recognised(room, form.files.get("files", []))
        name = secrets.token_hex(8)
        room.keep(room.uploads, name, number, _MOST_SESSIONS)
        return {"session_id": name, "session_info": _session_info(room, name)}

    @router.get("/session/{name}")
    def look(name: str) -> dict[str, Any]:
        """Say which case an upload shows."""
        return _session_info(room, name)

    @router.delete("/session/{name}")
    def end(name: str) -> dict[str, Any]:
        """Forget an upload."""
        info = _session_info(room, name)
        with room.lock:
            room.uploads.pop(name, None)
        return info


def _session_info(room: _Room, name: str) -> dict[str, Any]:
    with room.lock:
        if name not in room.uploads:
            raise HTTPException(404, "no such session")
        return {"name": name, "image": room.catalogue.ids[room.uploads[name]]}


def _recognised(room: _Room, sent: list[File]) -> int:
    if not sent:
        raise HTTPException(422, "expected a scan")
    found = room.catalogue.recognise(files.read_scan(sent).data)
    if found is None:
        raise InputError("this scan is none with a result here; start the server with it below --scans")
    return found.number
