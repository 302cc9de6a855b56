"""The same cases for other programs, by protocols that they speak already.

- :mod:`.monailabel`: the list of cases, results, clicks and acceptance, for 3D Slicer and OHIF;
- :mod:`.nninteractive`: points, boxes, scribbles and lassos, for 3D Slicer and napari;
- :mod:`.dicomweb`, :mod:`.ohif`: series of DICOM files, and OHIF itself where the package that carries it is installed;
- :mod:`.catalogue`: how these programs name cases and structures, and which case a scan is;
- :mod:`.files`, :mod:`.multipart`, :mod:`.canvas`, :mod:`.leases`: what the two are made of.
"""

from importlib.util import find_spec

from fastapi import FastAPI

from ..app import Desk
from . import dicomweb, monailabel, ohif
from .catalogue import Catalogue

#: Paths that take whole scans, and masks of them.
SCANS = frozenset(
    {
        *("/session/", "/datastore/label", "/set_image", "/add_scribble_interaction", "/add_lasso_interaction"),
        "/add_initial_seg_interaction",
    }
)


def has_nninteractive() -> bool:
    """Check whether the package is there that packs and unpacks nnInteractive's arrays."""
    return find_spec("blosc2") is not None and find_spec("nnInteractive") is not None


def mount(app: FastAPI, desk: Desk) -> None:
    """Answer the protocols too: MONAI Label always, nnInteractive's where its client is installed."""
    catalogue = Catalogue(desk.cases, desk.context)
    app.include_router(monailabel.router_of(desk, catalogue))
    app.include_router(dicomweb.router_of(catalogue))
    viewer = ohif.folder_of_ohif()
    if viewer is not None:
        app.include_router(ohif.router_of(viewer))
    if has_nninteractive():
        from . import nninteractive

        app.include_router(nninteractive.router_of(desk, catalogue))
