"""DICOM series for viewers by DICOMweb, and OHIF itself on them in a headless browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
import pydicom
from pydicom.uid import RLELossless

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.serve.app import Desk
from atlassegfm.serve.cases import Cases
from atlassegfm.serve.protocols.ohif import folder_of_ohif
from dicom_series import PATIENT, SERIES, STUDY, write_series
from result_folders import write_result
from scenes import QUERY, STRUCTURES, straight_grid
from servers import serving

#: An odd number of slices: the one that is shown first is no mean of two.
GRID = Grid((40, 32, 19), np.array([[-2.4, 0, 0, 46], [0, -2.4, 0, 38], [0, 0, 3.4, -30], [0, 0, 0, 1]]))

#: Voxels of the segmentation in OHIF.
VOXELS = "services.segmentationService.getLabelmapVolume('1').voxelManager.getCompleteScalarDataArray()"


def compressed(dataset: pydicom.Dataset, k: int) -> None:
    """A slice as clinics store it: with an element of the scanner's maker, and every other one compressed."""
    block = dataset.private_block(0x0029, "MAKER", create=True)
    block.add_new(0x10, "LO", "secret")
    if k % 2:
        dataset.compress(RLELossless)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A case that is a DICOM series, with a result, and one that is a file."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    values = np.rint(QUERY.scan(GRID).data).astype(np.int16)
    write_series(scans / "series", values, GRID.affine, change=compressed)
    write_result(out / "series", 0, keep=False)
    save_volume(QUERY.labels(GRID), out / "series/segmentation.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(straight_grid()), scans / "file.nii.gz")
    return Desk(Cases.find([scans], out))


def value(row: dict[str, Any], tag: str) -> Any:
    return row[tag]["Value"][0]


def test_a_viewer_lists_and_loads_a_series(desk: Desk) -> None:
    """What OHIF asks for, and the pixels of the files, stored values to the bit."""
    with serving(desk) as url, httpx.Client(base_url=f"{url}dicom-web/") as http:
        paging = "limit=101&offset=0&fuzzymatching=false&includefield=00081030%2C00080060"
        (study,) = http.get(f"studies?{paging}").json()
        assert (value(study, "0020000D"), value(study, "00080061"), value(study, "00201208")) == (STUDY, "CT", 19)
        assert value(study, "00100010") == {"Alphabetic": "Müller^Erika"}
        for search, count in (
            (f"{paging}&StudyInstanceUID={STUDY}", 1),
            (f"00100020={PATIENT}", 1),
            ("PatientName=*erika*", 1),
            ("PatientName=*mustermann*", 0),
            ("StudyDate=20260101-20260103&ModalitiesInStudy=CT", 1),
            ("StudyDate=20260103-", 0),
            ("ModalitiesInStudy=MR", 0),
            ("limit=1&offset=1", 0),
        ):
            assert len(http.get(f"studies?{search}").json()) == count, search
        (series,) = http.get(f"studies/{STUDY}/series?includefield=00200011").json()
        assert (value(series, "0020000E"), value(series, "00201209")) == (SERIES, 19)

        slices = http.get(f"studies/{STUDY}/series/{SERIES}/metadata").json()
        assert [value(one, "00200032") for one in slices] == sorted(value(one, "00200032") for one in slices)
        assert "secret" not in json.dumps(slices)
        assert not any("7FE00010" in one for one in slices)
        stored = []
        for one in slices:
            answer = http.get(f"studies/{STUDY}/series/{SERIES}/instances/{value(one, '00080018')}/frames/1")
            head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
            part = next(iter(BytesParser(policy=HTTP).parsebytes(head + answer.content).iter_parts()))
            assert part.get_content_type() == "application/octet-stream"
            assert part.get_param("transfer-syntax") == "1.2.840.10008.1.2.1"
            stored.append(
                np.frombuffer(answer.content.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0], "<i2").reshape(32, 40)
            )
        assert np.array_equal(np.stack(stored).T, np.rint(QUERY.scan(GRID).data))

        for path in ("studies/1.2/series/3.4/metadata", f"studies/{STUDY}/series/{SERIES}/instances/1/frames/1"):
            refused = http.get(path)
            assert refused.status_code == 404
            assert refused.json()["detail"]
        assert http.get("studies?NoSuchElement=1").status_code == 400
        assert httpx.get(f"{url.rsplit('/', 2)[0]}/dicom-web/studies").status_code == 404  # without the token


def test_a_series_that_is_damaged_is_left_out(desk: Desk) -> None:
    for path in (desk.cases.out.parent / "scans/series").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    with serving(desk) as url:
        answer = httpx.get(f"{url}dicom-web/studies")
        assert (answer.status_code, answer.json()) == (200, [])


@pytest.mark.slow
@pytest.mark.skipif(folder_of_ohif() is None, reason="the package monailabel, which carries OHIF, is not installed")
def test_ohif_shows_and_corrects_a_result(desk: Desk, browser: Callable[..., Any]) -> None:
    """List, open, automatic result, and a click, in the viewer's own panel; its voxels are those of the file."""
    labels = load_labels(desk.cases.out / "series/segmentation.nii.gz").data
    elsewhere: list[str] = []
    crashes: list[str] = []
    with serving(desk) as url:
        page = browser(webgl=True).new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: crashes.append(str(error)))
        page.on(
            "response", lambda one: None if one.url.startswith((url, "data:", "blob:")) else elsewhere.append(one.url)
        )
        page.goto(f"{url}ohif/")
        page.locator("span.truncate", has_text="Erika").first.click()
        page.get_by_text("MONAI Label", exact=True).click()
        page.wait_for_function(
            "() => [...(window.cornerstone?.cache._volumeCache.values() ?? [])].some(v => v.volume?.loadStatus?.loaded)"
        )
        assert page.input_value("#monailabelServerURL") == url
        page.locator(".settingsTable button").click()
        page.wait_for_selector(".subtitle")

        def shown() -> np.ndarray:
            return np.array(page.evaluate(f"() => Array.from({VOXELS})"), np.uint8).reshape(labels.shape, order="F")

        def run(tab: Any) -> str:
            with page.expect_response(lambda one: "/infer/" in one.url) as answered:
                tab.locator("button", has_text="Run").click()
            assert answered.value.status == 200
            return str(answered.value.request.post_data)

        page.wait_for_function("() => services.segmentationService.getLabelmapVolume('1')")
        run(page.locator(".tab", has_text="fully automated"))
        page.wait_for_function(f"() => {VOXELS}.includes(3)")
        # OHIF numbers structures by name: kidney, liver, node.
        assert np.array_equal(shown(), np.array([0, 2, *[0] * 5, 1, *[0] * 4, 3], np.uint8)[labels])

        page.get_by_text("Point Prompts").click()
        points = page.locator(".tab", has_text="Available Organ")
        points.locator("select").select_option("correct_in_ohif")
        points.locator("tr.clickable-row", has_text="kidney").click()
        page.wait_for_function(
            "() => cornerstoneTools.ToolGroupManager.getToolGroup('mpr')?.getActivePrimaryMouseButtonTool()"
            " === 'ProbeMONAILabel'"
        )
        ijk = beside_a_structure(labels, 7, page)
        view = page.locator("[data-viewport-uid='mpr-axial']").bounding_box()
        x, y = page.evaluate(
            """(ijk) => {
              const view = cornerstone.getRenderingEngines()[0].getViewport("mpr-axial");
              return view.worldToCanvas(view.getImageData().imageData.indexToWorld(ijk));
            }""",
            ijk,
        )
        page.mouse.click(view["x"] + x, view["y"] + y)
        page.wait_for_function("() => cornerstoneTools.annotation.state.getAllAnnotations().length === 1")
        assert f'"points":{json.dumps(ijk, separators=(",", ":"))}'.replace(":[", ":[[") in run(points)
        page.wait_for_function(f"(n) => {VOXELS}[n] === 1", arg=int(np.ravel_multi_index(ijk, labels.shape, order="F")))
        assert np.array_equal(shown() == 2, labels == 1)
        page.close()
    assert not elsewhere
    assert not crashes


def beside_a_structure(labels: np.ndarray, value: int, page: Any) -> list[int]:
    """A voxel two to the side of a structure, on the slice that is shown."""
    k = page.evaluate("() => cornerstone.getRenderingEngines()[0].getViewport('mpr-axial').getSliceIndex()")
    voxels = np.argwhere(labels[:, :, k] == value)
    i, j = voxels[voxels[:, 0].argmax()].tolist()
    return [i + 2, j, k]
