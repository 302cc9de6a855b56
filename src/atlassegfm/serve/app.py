"""Requests of the page. Cases and structures go by number; nothing of a request becomes a path."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ..atlas import Atlas
from ..context import CHECKSUMS, Context
from ..core.errors import AtlasSegError, InputError
from ..core.image import Volume
from ..core.version import __version__
from ..jobs.review import refresh_summary
from ..models.base import Segmenter
from ..models.table import load_model
from ..records import RUN, RunRecord
from ..report.folder import shown_reason
from . import view
from .cases import Cases
from .clicks import Click, Patch
from .cohort import Cohort
from .edits import pack, unpack
from .session import ConflictError, Done, LockedError, Session

logger = logging.getLogger(__name__)

#: Files of the page by the last part of their address, and their kinds.
_PAGE = {
    "": ("serve", "page.html", "text/html; charset=utf-8"),
    "page.css": ("serve", "page.css", "text/css; charset=utf-8"),
    "app.js": ("serve", "app.js", "text/javascript; charset=utf-8"),
    "slices.js": ("serve", "slices.js", "text/javascript; charset=utf-8"),
    "wire.js": ("serve", "wire.js", "text/javascript; charset=utf-8"),
    "solid.js": ("serve", "solid.js", "text/javascript; charset=utf-8"),
    "niivue.js": ("report", "niivue.umd.js", "text/javascript; charset=utf-8"),
}

Number = Annotated[int, Field(ge=0, le=100_000)]
Who = Annotated[str, Field(max_length=80, pattern=r"^[^\x00-\x1f\x7f]*$")]
Client = Annotated[str, Field(max_length=40, pattern=r"^[A-Za-z0-9-]+$")]
Voxel = tuple[Number, Number, Number]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sign(_Body):
    """A sign of life: who is at which case."""

    client: Client
    by: Who = ""
    case: Number | None = None


class Versioned(_Body):
    """Whose request, and for which version of the case."""

    version: Number
    by: Who = ""


class Edit(Versioned):
    """One edit of one structure; which of the optional fields it needs depends on the verb."""

    verb: Literal[
        "paint",
        "erase",
        "click",
        "fill",
        "interpolate",
        "atlas",
        "model",
        "version",
        "reset",
        "absent",
        "relabel",
        "swap",
    ]
    structure: Number
    overwrite: bool = False
    start: Voxel | None = None
    shape: Voxel | None = None
    mask: str = Field(default="", max_length=14_000_000)  # base64 of compressed bytes, 0 and 1, first axis fastest
    ijk: Voxel | None = None
    positive: bool = True
    axis: Literal[0, 1, 2] | None = None
    other: Number | None = None
    annotator: Who = ""


class Acceptance(Versioned):
    """Structures to accept or to open again; all of them by default."""

    structures: list[Number] | None = Field(default=None, max_length=10_000)


class Annotator(_Body):
    """Whose version is wanted: the name travels in a body, as addresses are kept by browsers."""

    name: Who


@dataclass
class Desk:
    """What requests work on. ``context`` is the folder of the context, None where results are only reviewed."""

    cases: Cases
    context: Path | None = None
    cohort: Cohort | None = None
    title: str = ""
    context_lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def model(self) -> Segmenter:
        """The model that answers clicks."""
        return load_model("builtin", "cpu")


@cache
def _asset(room: str, name: str) -> bytes:
    return (resources.files(f"{__package__.rpartition('.')[0]}.{room}") / "assets" / name).read_bytes()


def make_app(desk: Desk) -> FastAPI:
    """Make the application that answers the page; a guard belongs around it."""
    app = FastAPI(
        title="AtlasSegFM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    _answer_errors(app)
    _serve_page(app)
    _serve_list(app, desk)
    _serve_case(app, desk)
    _serve_edits(app, desk)
    _serve_cohort(app, desk)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Answer what is raised on purpose with a status and a sentence without folders."""

    def answer(status: int, text: Callable[[Exception], str]) -> Callable[[Request, Exception], JSONResponse]:
        return lambda _request, error: JSONResponse({"detail": text(error)}, status)

    conflict = "the labels have changed meanwhile; they are loaded again"
    app.add_exception_handler(ConflictError, answer(409, lambda _: conflict))
    app.add_exception_handler(LockedError, answer(423, lambda one: f"{one} is accepted; open it again to change it"))
    app.add_exception_handler(KeyError, answer(404, lambda _: "no such case"))
    app.add_exception_handler(AtlasSegError, answer(422, lambda one: shown_reason(str(one))))


def _serve_page(app: FastAPI) -> None:
    def send(name: str) -> Callable[[], Response]:
        room, file, kind = _PAGE[name]
        return lambda: Response(_asset(room, file), media_type=kind)

    for name in _PAGE:
        app.get(f"/{name}")(send(name))


def _serve_list(app: FastAPI, desk: Desk) -> None:
    @app.post("/api/state")
    def state(sign: Sign) -> dict[str, Any]:
        """Cases for the list, the run, and who else is at the case."""
        cases = desk.cases
        if sign.case is not None:
            cases.get(sign.case)
        cases.sign(sign.client, sign.by, sign.case)
        rows = [cases.summary(n) for n in range(len(cases.entries))]
        for row in rows:
            row["taken"] = cases.others_at(row["id"], sign.client)
        rows.sort(key=lambda row: (row["urgency"], row["name"]))
        return {
            "title": desk.title,
            "version": __version__,
            "cases": rows,
            "run": None if desk.cohort is None else _run_state(desk.cohort, cases),
            "context": None if desk.context is None else _context_state(desk.context, desk.context_lock),
        }


def _serve_case(app: FastAPI, desk: Desk) -> None:
    @app.get("/api/cases/{number}")
    def case(number: Number) -> dict[str, Any]:
        """Geometry, windows and structures of a case."""
        with _opened(desk, number) as session:
            return view.describe(session)

    @app.get("/api/cases/{number}/scan")
    def scan(number: Number) -> Response:
        """Intensities of a case."""
        with _opened(desk, number) as session:
            return Response(view.scan_bytes(session), media_type="application/octet-stream")

    @app.get("/api/cases/{number}/labels/{kind}")
    def labels(number: Number, kind: Literal["draft", "atlas", "model"]) -> Response:
        """Structure numbers of a case, compressed; of the draft with its version."""
        with _opened(desk, number) as session:
            found = session.numbers if kind == "draft" else session.source(kind)
            if found is None:
                raise HTTPException(404, "these labels were not kept")
            headers = {"x-version": str(session.version)}
            return Response(pack(found), media_type="application/octet-stream", headers=headers)

    @app.post("/api/cases/{number}/version")
    def version(number: Number, body: Annotator) -> Response:
        """Structure numbers as a person accepted them last, compressed."""
        with _opened(desk, number) as session:
            return Response(pack(session.version_by(body.name)), media_type="application/octet-stream")

    @app.get("/api/cases/{number}/disagreement/{structure}")
    def disagreement(number: Number, structure: Number) -> dict[str, Any]:
        """Where atlas and model disagree most on a structure; null if they agree."""
        with _opened(desk, number) as session:
            return {"ijk": session.disagreement(_numbers(session, [structure])[0])}

    @app.get("/api/cases/{number}/solid/{kind}")
    def solid(number: Number, kind: Literal["scan", "labels"]) -> dict[str, str]:
        """Scan or draft for the 3-D view."""
        with _opened(desk, number) as session:
            return {"nifti": view.scan_3d(session) if kind == "scan" else view.labels_3d(session)}


def _serve_edits(app: FastAPI, desk: Desk) -> None:
    @app.post("/api/cases/{number}/edit")
    def edit(number: Number, body: Edit) -> dict[str, Any]:
        """Do one edit."""
        with _editable(desk, number, body) as session:
            return _answer(session, _do(session, body, desk))

    @app.post("/api/cases/{number}/undo")
    def undo(number: Number, body: Versioned) -> dict[str, Any]:
        """Take the last edit back."""
        with _editable(desk, number, body) as session:
            return _answer(session, session.undo(body.by))

    @app.post("/api/cases/{number}/redo")
    def redo(number: Number, body: Versioned) -> dict[str, Any]:
        """Do again what was taken back."""
        with _editable(desk, number, body) as session:
            return _answer(session, session.redo(body.by))

    @app.post("/api/cases/{number}/accept")
    def accept(number: Number, body: Acceptance) -> dict[str, Any]:
        """Write the result, with structures as accepted."""
        with _editable(desk, number, body) as session:
            session.accept(_numbers(session, body.structures), body.by)
            refresh_summary(desk.cases.out)
            return _answer(session, Done(None))

    @app.post("/api/cases/{number}/reopen")
    def reopen(number: Number, body: Acceptance) -> dict[str, Any]:
        """Withdraw the acceptance of structures."""
        with _editable(desk, number, body) as session:
            session.reopen(_numbers(session, body.structures), body.by)
            refresh_summary(desk.cases.out)
            return _answer(session, Done(None))


def _serve_cohort(app: FastAPI, desk: Desk) -> None:
    @app.post("/api/cases/{number}/atlas")
    def add_atlas(number: Number) -> dict[str, Any]:
        """Make an accepted case an atlas of the context."""
        if desk.context is None:
            raise HTTPException(409, "there is no context: results are only reviewed here")
        with _opened(desk, number) as session, desk.context_lock:
            if len(session.locked) < len(session.structures):
                raise HTTPException(409, "accept all structures of the case first")
            _add_atlas(desk.context, session)
        return _context_state(desk.context, desk.context_lock)

    @app.post("/api/run")
    def start() -> dict[str, Any]:
        """Segment what has no result, and again what is open and would come out otherwise now."""
        cohort = _cohort(desk)
        cases, _ = desk.cases.to_run()
        cohort.start(cases)
        return _run_state(cohort, desk.cases)

    @app.post("/api/run/stop")
    def stop() -> dict[str, Any]:
        """Stop the run; what is done stays."""
        cohort = _cohort(desk)
        cohort.stop()
        return _run_state(cohort, desk.cases)


@contextmanager
def _opened(desk: Desk, number: int) -> Iterator[Session]:
    """Open a case, which no other request changes meanwhile."""
    session = desk.cases.open(number)
    with session.lock:
        yield session


@contextmanager
def _editable(desk: Desk, number: int, body: Versioned) -> Iterator[Session]:
    """Open a case at the version that the request knows, and that no run is about to replace."""
    if desk.cohort is not None and desk.cohort.is_computing(desk.cases.get(number).case.name):
        raise HTTPException(423, "the case is being segmented; wait until that is done, or stop the run")
    with _opened(desk, number) as session:
        session.check(body.version)
        yield session


def _do(session: Session, body: Edit, desk: Desk) -> Done:
    """Do what the verb says; HTTPException if the request lacks what it needs, or that is not on the scan."""
    number = _numbers(session, [body.structure])[0]
    by, overwrite = body.by, body.overwrite
    match body.verb:
        case "paint" | "erase":
            return session.paint(number, by, _patch(session, body), erase=body.verb == "erase", overwrite=overwrite)
        case "click":
            return session.click(
                desk.model, number, by, Click(_voxel(session, body), body.positive), overwrite=overwrite
            )
        case "fill":
            index = _voxel(session, body)[body.axis] if body.axis is not None else 0
            return session.fill(number, by, body.axis, index, overwrite=overwrite)
        case "interpolate":
            return session.interpolate(number, by, body.axis or 0, overwrite=overwrite)
        case "atlas" | "model":
            return session.take(number, by, body.verb, overwrite=overwrite)
        case "version":
            return session.take_version(number, by, body.annotator, overwrite=overwrite)
        case "reset":
            return session.take(number, by, "automatic", overwrite=overwrite)
        case "absent":
            return session.remove(number, by)
        case "relabel" | "swap":
            other = _numbers(session, [number if body.other is None else body.other])[0]
            return session.relabel(number, other, by, swap=body.verb == "swap")


def _numbers(session: Session, asked: Sequence[int] | None) -> list[int]:
    count = len(session.structures)
    if asked is None:
        return list(range(1, count + 1))
    if not all(1 <= n <= count for n in asked):
        raise HTTPException(422, f"structures go by numbers from 1 to {count}")
    return list(asked)


def _voxel(session: Session, body: Edit) -> tuple[int, int, int]:
    if body.ijk is None or any(n >= size for n, size in zip(body.ijk, session.grid.shape, strict=True)):
        raise HTTPException(422, f"expected a voxel (ijk) of a scan of {session.grid.shape}")
    return body.ijk


def _patch(session: Session, body: Edit) -> Patch:
    start, shape = body.start, body.shape
    if start is None or shape is None or not all(shape):
        raise HTTPException(422, "expected a box: start and shape")
    if any(first + n > size for first, n, size in zip(start, shape, session.grid.shape, strict=True)):
        raise HTTPException(422, f"the box reaches out of a scan of {session.grid.shape}")
    try:
        mask = unpack(base64.b64decode(body.mask, validate=True), shape, np.dtype(np.uint8))
    except ValueError as error:
        raise HTTPException(422, f"the mask cannot be read: {error}") from None
    return Patch(start, mask != 0)


def _answer(session: Session, done: Done) -> dict[str, Any]:
    """The box that changed with its structure numbers, what others kept or lost, and the state."""
    changed: dict[str, Any] | None = None
    if done.change is not None:
        data = base64.b64encode(done.change.after).decode("ascii")
        changed = {"start": done.change.start, "shape": done.change.shape, "data": data}
    others = {session.structures[n - 1].name: voxels for n, voxels in done.others.items()}
    return {"changed": changed, "others": others, **view.state(session)}


def _cohort(desk: Desk) -> Cohort:
    if desk.cohort is None:
        raise HTTPException(409, "there is no context: results are only reviewed here")
    return desk.cohort


def _run_state(cohort: Cohort, cases: Cases) -> dict[str, Any]:
    return {
        "state": cohort.state,
        "reason": shown_reason(cohort.reason),
        "counts": cohort.outcome.counts,
        "stages": cohort.stages,
        "compared": cohort.compared,
        "drafts": cases.to_run()[1],
    }


@cache
def _context_summary(folder: Path, _stamp: int) -> dict[str, Any]:
    context = Context.load(folder)
    return {
        "name": folder.resolve().name,
        "model": context.settings.model,
        "atlases": len(context.atlases),
        "files": [name for role, name in context.files.items() if role.startswith("atlas")],
    }


def _context_state(folder: Path, lock: threading.RLock) -> dict[str, Any]:
    with lock:  # while it is written, it is not there for a moment
        return _context_summary(folder, (folder / CHECKSUMS).stat().st_mtime_ns)


def _add_atlas(folder: Path, session: Session) -> None:
    """Add the accepted labels of a case to the context."""
    run, numbers = RunRecord.read(session.folder / RUN), session.numbers
    if not numbers.any():
        raise InputError("the case has no structure; an atlas needs one")
    values = np.array((0, *session.values), np.uint32)
    present = [one for n, one in enumerate(session.structures, start=1) if (numbers == n).any()]
    atlas = Atlas.from_volumes(session.scan, Volume(values[numbers], session.grid), present)
    name = "" if run.inputs.query is None else run.inputs.query.file
    context = Context.load(folder).with_atlas(atlas, session.folder.name, {"atlas": name, "labels": "accepted"})
    context.save(folder)
