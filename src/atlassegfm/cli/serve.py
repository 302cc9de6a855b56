"""``atlassegfm serve``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import InputError
from .fields import argument, flag, option, options, required
from .options import DeviceOptions, ModelOptions, ScreenOptions
from .session import Session

if TYPE_CHECKING:
    from ..serve.app import Desk


@options
class ServeOptions(ScreenOptions, DeviceOptions, ModelOptions):
    """Options of ``serve``."""

    context: Path | None = argument(
        "[CTX]", "A folder that `atlassegfm customize` wrote; not with --review-only.", None
    )
    scans: list[Path] = required("--scans FOLDER", "The scans: files, or folders of them; may be repeated.")
    out: Path = required("--out -o OUT", "Folder of the results, as `segment -o` writes it; made if there is none.")
    review_only: bool = flag("--review-only", "Look at results and correct them, without a context.")
    labels: Path | None = option(
        "--labels FOLDER",
        "With --review-only: label maps of any program, named after the scans; each is copied to OUT/CASE once.",
    )
    workers: int = option("--workers N", "Scans to segment at a time, each in a process of its own.", 1, min=1)
    host: str = option(
        "--host ADDRESS",
        "Where to listen. Another than 127.0.0.1 lets other machines in: whoever has the address sees the scans, and "
        "it travels unencrypted.",
        "127.0.0.1",
    )
    port: int = option("--port N", "Port to listen on; 0 takes any that is free.", 8765, min=0, max=65535)
    allow_origin: list[str] | None = option(
        "--allow-origin URL",
        "A page of another server that may send requests, such as OHIF's http://localhost:3000; may be repeated.",
    )
    open_page: bool = option("--open/--no-open", "Open the page in the browser.", True)

    def check(self) -> None:
        """Refuse options that do not go together, before anything is read."""
        if self.review_only and self.context is not None:
            raise InputError("--review-only: goes without a context; leave out one of the two")
        if not self.review_only and self.context is None:
            raise InputError(
                "a context is missing; give the folder that `atlassegfm customize` wrote, or --review-only"
            )
        if self.labels is not None and not self.review_only:
            raise InputError("--labels: goes with --review-only; leave it out, or add that")
        if self.context is not None and self.out.resolve().is_relative_to(self.context.resolve()):
            raise InputError(f"{self.out}: is inside the context {self.context}; choose another output folder")


def serve(options: ServeOptions) -> None:
    """Look at results in the browser, correct them, and let what you accept improve the rest.

    The page lists the cases by what most needs eyes. Clicks are answered by the built-in model; brush, eraser and
    interpolation do the rest. Accepted cases are never computed again, and each can become an atlas of the context with
    one button.
    3D Slicer, OHIF and napari can take cases from the same address, correct and accept them. It has a random token;
    nothing leaves this machine.
    """
    with options.session() as session:
        options.check()
        from ..core.extras import require

        require("the page to review results", "server", "fastapi", "uvicorn", "SimpleITK")
        from ..core.files import output_folder
        from ..serve.start import Place, checked_origin, serve

        origins = frozenset(map(checked_origin, options.allow_origin or ()))
        place = Place(options.host, options.port, origins)
        if not place.is_local:
            session.say(
                f"--host {options.host}: other machines can reach the page; whoever has its address sees the scans and "
                "can change results, and nothing is encrypted: use it in a network you trust"
            )

        def announce(addresses: dict[str, str | None]) -> None:
            said = [f"page      {addresses['url']}"]
            if addresses["ohif"]:
                said.append(f"OHIF      {addresses['ohif']}")
            said.append("3D Slicer, OHIF and napari take the page's address too; Ctrl-C ends the server")
            typer.echo(json.dumps(addresses) if options.as_json else "\n".join(said))
            if options.open_page:
                typer.launch(str(addresses["url"]))

        # An interrupt is how a server ends.
        with output_folder(options.out), contextlib.suppress(KeyboardInterrupt):
            serve(_desk(options, session), place, announce)


def _desk(options: ServeOptions, session: Session) -> Desk:
    """Find the cases, and prepare the run."""
    from ..core.device import resolve_device
    from ..core.files import remove_unfinished
    from ..serve.app import Desk
    from ..serve.cases import Cases, import_folder
    from ..serve.cohort import Cohort, Job

    # What a killed server was replacing is put back.
    for folder in (options.out, *(() if options.context is None else (options.context.resolve().parent,))):
        remove_unfinished(folder)
    cohort = None
    if options.context is not None:
        from ..context import Context

        session.progress("reading the context")
        context = Context.load(options.context)
        settings = options.settings(context.settings)
        context.check_settings(settings)
        options.accept(settings, session)
        device = resolve_device(options.device)
        cohort = Cohort(Job(options.context, options.out, options.settings, device, options.workers))
    session.progress("finding the scans")
    if options.labels is not None:
        for problem in import_folder(options.labels, options.scans, options.out):
            session.error(problem)
    inputs = [path for path in (options.context, options.labels) if path is not None]
    cases = Cases.find(options.scans, options.out, inputs)
    return Desk(cases, options.context, cohort, options.out.resolve().name)
