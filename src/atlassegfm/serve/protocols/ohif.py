"""The OHIF viewer that the package ``monailabel`` carries, with its panel, on the cases that are DICOM series.

It was built for the address /ohif/ and for a DICOMweb server: here it lies below the token, gets the series from
:mod:`.dicomweb` and its panel the address of :mod:`.monailabel`. Nothing of the package is imported.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

#: What the viewer is told: run in the browser, which alone knows the whole address.
_CONFIG = """\
const root = location.pathname.split("/ohif/")[0];
document.cookie = "MONAILABEL_SERVER_URL=" + escape(location.origin + root + "/") + "; path=" + root + "/ohif/";
window.config = {
  routerBasename: root + "/ohif/",
  showStudyList: true,
  extensions: [],
  modes: [],
  useSharedArrayBuffer: "FALSE",
  defaultDataSourceName: "dicomweb",
  dataSources: [{
    namespace: "@ohif/extension-default.dataSourcesModule.dicomweb",
    sourceName: "dicomweb",
    configuration: {
      friendlyName: "AtlasSegFM",
      name: "AtlasSegFM",
      qidoRoot: root + "/dicom-web",
      wadoRoot: root + "/dicom-web",
      imageRendering: "wadors",
      thumbnailRendering: "wadors",
      enableStudyLazyLoad: true,
      supportsFuzzyMatching: false,
      supportsWildcard: true,
    },
  }],
};
"""
#: Parts of it are made of text and of WebAssembly; nothing comes from elsewhere.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def folder_of_ohif() -> Path | None:
    """Find the viewer; None if the package is not installed."""
    found = find_spec("monailabel")
    for place in () if found is None else found.submodule_search_locations or ():
        folder = Path(place) / "endpoints" / "static" / "ohif"
        if (folder / "index.html").is_file():
            return folder
    return None


def router_of(folder: Path) -> APIRouter:
    """Make the routes of the viewer's files."""
    router = APIRouter(prefix="/ohif")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    @router.get("/{name:path}")
    def file(name: str) -> Response:
        """Send a file of the viewer; its first page for what is none, as the viewer has addresses of its own."""
        headers = {"content-security-policy": _POLICY, "cache-control": "private, max-age=3600"}
        if name == "app-config.js":
            return Response(_CONFIG, media_type="text/javascript", headers=headers)
        path = files.get(name)
        if path is None or path.name == "index.html":
            up = "../" * name.count("/") or "./"
            return Response(_page(folder, up), media_type="text/html; charset=utf-8", headers=headers)
        if path.suffix == ".js":
            return Response(_script(path), media_type="text/javascript; charset=utf-8", headers=headers)
        return FileResponse(path, media_type=guess_type(name)[0], headers=headers)

    return router


def _page(folder: Path, up: str) -> str:
    """The first page, without what it loads from elsewhere."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = re.sub(r'<link[^>]*"https?://[^>]*>', "", page).replace('"/ohif/', f'"{up}')
    return page.replace("'/ohif/'", 'location.pathname.split("/ohif/")[0] + "/ohif/"')


def _script(path: Path) -> bytes:
    """A script, which finds the others below the token."""
    here = b'= self.location.pathname.split("/ohif/")[0] + "/ohif/"'
    return path.read_bytes().replace(b'= "/ohif/"', here)
