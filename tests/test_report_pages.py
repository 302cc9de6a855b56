"""Report pages: content, what they must not hold, and how a browser shows them without a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.jobs import scans_of
from atlassegfm.quality.verdict import VERDICTS
from atlassegfm.records import (
    CaseRecord,
    CohortRecord,
    RunRecord,
    State,
    StatusRecord,
)
from atlassegfm.report import ReportOptions, write_report
from atlassegfm.report.distribution import outliers
from atlassegfm.report.folder import read_folder, shown_reason
from atlassegfm.report.slices import is_hounsfield, structure_panels, structure_window
from atlassegfm.report.viewer import labels_payload, reduction, scan_payload
from conftest import Run
from result_folders import DONE, SECRET, WITHOUT_PICTURES, data_of, run_record, write_result
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of results and one of scans; judged, one without masks, one failed, one without its scan."""
    root = tmp_path_factory.mktemp(SECRET)
    out, scans = root / "out", root / "scans"
    scans.mkdir()
    write_result(out / "b_case", 0, ("good", "review", "failed"))
    write_result(out / "a_case", 2, ("good", "good", "good"))
    write_result(out / "c case & <i>", 4, ("good", "good", "review"), keep=False)
    for name in ("a_case", "b_case"):
        scan = QUERY.scan(straight_grid())
        save_volume(scan, scans / f"{name}.nii.gz")
    broken = out / "d_case"
    broken.mkdir()
    reason = f"{root}/scans/d_case.nii.gz: the file is damaged; copy it again"
    StatusRecord(state="failed", reason=reason).write(broken / "status.json")
    write_report(out, scans=scans_of(out, [scans]).scans, options=WITHOUT_PICTURES)
    return out, scans


# What is in the pages


def test_results_without_verdicts_have_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a registration that verdicts are not calibrated for; among others of which some are judged."""
    monkeypatch.setattr("atlassegfm.report.cohort._MOST_PICTURES", 1)
    save_volume(QUERY.scan(straight_grid()), tmp_path / "scan.nii.gz")
    for name, verdicts in (("a", (None, None, None)), ("b", ("good", None, "review"))):
        write_result(tmp_path / "out" / name, 0, verdicts)
    write_report(tmp_path / "out", scans={"a": tmp_path / "scan.nii.gz"}, options=WITHOUT_PICTURES)
    data = data_of(tmp_path / "out/report.html", "table-data")
    assert data["cases"]["verdict"] == [None, "review"]
    assert data["structures"]["verdict"] == [None, None, None, "good", None, "review"]
    for page in ("report.html", "a/report.html"):
        assert "None" not in re.sub(
            r"<script.*?</script>|because None", "", (tmp_path / "out" / page).read_text(), flags=re.DOTALL
        )


def test_volumes_of_cut_structures_are_no_outliers(tmp_path: Path) -> None:
    for number in range(6):
        write_result(tmp_path / f"case{number}", number / 10)
    path = tmp_path / "case5/run.json"
    record = json.loads(path.read_text())
    found = []
    for outside in (0.0, 0.5):
        record["structures"][0] |= {
            "volume_ml": record["structures"][0]["volume_ml"] * 0.5,
            "outside_fraction": outside,
        }
        path.write_text(json.dumps(record))
        write_report(tmp_path, options=WITHOUT_PICTURES)
        found.append(data_of(tmp_path / "report.html", "table-data")["structures"]["outlier"][15])
    assert found == [True, False]


def test_table_has_every_case_and_structure(cohort: tuple[Path, Path]) -> None:
    data = data_of(cohort[0] / "report.html", "table-data")
    cases, structures = data["cases"], data["structures"]
    assert cases["name"] == ["a_case", "b_case", "c case & <i>", "d_case"]
    assert cases["verdict"] == ["good", "failed", "review", None]
    assert [cases[verdict][1] for verdict in VERDICTS] == [0, 1, 1, 1]
    assert cases["state"] == ["done", "done", "done", "failed"]
    assert cases["reason"][3] == "d_case.nii.gz: the file is damaged; copy it again"
    assert cases["seconds"] == [4.0, 4.0, 4.0, None]
    assert len(structures["case"]) == 9
    # Colours are those of the label file, not made up.
    assert data["colors"]["7"] == [70, 200, 50]
    # Agreement is there where the masks were kept.
    assert None not in structures["atlasModel"][:6]
    assert structures["atlasModel"][6:] == [None] * 3


def test_agreement_is_the_dice_of_the_kept_maps(cohort: tuple[Path, Path]) -> None:
    case = cohort[0] / "b_case"
    atlas, model = (np.asarray(nib.load(case / f"{n}.nii.gz").dataobj) for n in ("atlas", "model"))
    expected = 2 * ((atlas == 1) & (model == 1)).sum() / ((atlas == 1).sum() + (model == 1).sum())
    assert data_of(case / "report.html", "facts")["agreement"]["1"][0] == pytest.approx(expected, abs=1e-4)


def test_no_identifier_but_the_folder_names(cohort: tuple[Path, Path]) -> None:
    out = cohort[0]
    for page in (out / "report.html", *out.glob("*/report.html")):
        assert SECRET not in page.read_text()
    assert "d_case.nii.gz: the file is damaged" in (out / "report.html").read_text()


def test_nothing_is_loaded_from_anywhere(cohort: tuple[Path, Path]) -> None:
    for page in (cohort[0] / "report.html", cohort[0] / "a_case" / "report.html"):
        text = page.read_text()
        assert "default-src 'none'" in text
        for found in re.findall(r'(?:src|href)="([^"]*)"', text):
            assert found.startswith(("data:", "#", "../report.html", "a_case/", "b_case/", "c%20case")), found[:80]


def test_names_are_escaped(cohort: tuple[Path, Path]) -> None:
    out = cohort[0]
    for page in (out / "report.html", out / "b_case" / "report.html", out / "c case & <i>" / "report.html"):
        text = page.read_text()
        assert "because review <b>" not in text
        assert "case & <i>" not in text
    assert "c case &amp; &lt;i&gt;" in (out / "report.html").read_text()
    assert "because review &lt;b&gt;" in (out / "b_case" / "report.html").read_text()


def test_slices_show_each_structure_with_its_outlines(cohort: tuple[Path, Path]) -> None:
    text = (cohort[0] / "a_case" / "report.html").read_text()
    for one in STRUCTURES:
        section = re.search(rf'<section class="structure" id="s{one.value}">.*?</section>', text, re.DOTALL)
        assert section is not None
        assert section[0].count("data:image/png;base64,") == 3
        for kind in ("result", "atlas", "model"):
            assert section[0].count(f'<path class="{kind}" d="M') >= 2
        assert '<span class="l">R</span><span class="r">L</span>' in section[0]
        assert re.search(r"<em>\d+ mm</em>", section[0])


def test_an_outline_lies_where_the_structure_is(cohort: tuple[Path, Path]) -> None:
    text = (cohort[0] / "a_case" / "report.html").read_text()
    section = re.search(r'<section class="structure" id="s1">(.*?)</section>', text, re.DOTALL)
    assert section is not None
    axial = section[1].split("</figure>")[0]
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', axial)
    path = re.search(r'<path class="result" d="([^"]*)"', axial)
    assert size is not None
    assert path is not None
    points = np.array([[float(n) for n in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path[1])])
    # The liver: radii 17 x 14 mm times 1.05.
    assert np.ptp(points, axis=0) == pytest.approx([35.7, 29.4], abs=2.5)
    # It is at the patient's right, which is the left of the picture, where the margin is wide enough on either side.
    assert points[:, 0].min() > 5
    assert points[:, 0].max() < float(size[1]) - 5


def test_missing_scan_and_masks_are_said(cohort: tuple[Path, Path]) -> None:
    text = (cohort[0] / "c case & <i>" / "report.html").read_text()
    assert "only labels are shown" in text
    assert "segment --keep" in text
    assert set(data_of(cohort[0] / "c case & <i>" / "report.html", "viewer-data")["volumes"]) == {"result"}


def test_licence_of_the_weights_stands_out(cohort: tuple[Path, Path]) -> None:
    for page in (cohort[0] / "report.html", cohort[0] / "a_case" / "report.html"):
        assert "CC BY-NC-SA 4.0" in page.read_text()
        assert "no commercial use" in page.read_text()


def test_pages_up_to_date_are_kept(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(cohort[0], tmp_path / "out", copy_function=shutil.copy2)
    pages = [out / name / "report.html" for name in ("a_case", "b_case")]
    before = [page.stat().st_mtime_ns for page in pages]
    first = (out / "report.html").read_bytes()
    run = RunRecord.read(out / "b_case" / "run.json")
    run.model_copy(update={"seed": 1}).write(out / "b_case" / "run.json")
    write_report(out, scans=scans_of(out, [cohort[1]]).scans, options=WITHOUT_PICTURES)
    after = [page.stat().st_mtime_ns for page in pages]
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert (out / "report.html").read_bytes() == first
    write_report(out, scans=scans_of(out, [cohort[1]]).scans, options=replace(WITHOUT_PICTURES, force=True))
    assert pages[0].stat().st_mtime_ns > before[0]


def test_a_damaged_result_costs_only_its_own_page(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(cohort[0], tmp_path / "out")
    (out / "b_case" / "atlas.nii.gz").write_bytes(b"nothing")
    (out / "e_case").mkdir()
    (out / "e_case" / "run.json").write_text("[]")
    written = write_report(out, scans=scans_of(out, [cohort[1]]).scans, options=WITHOUT_PICTURES)
    assert len(written.problems) == 1
    assert written.problems[0].startswith("b_case: ")
    cases = data_of(out / "report.html", "table-data")["cases"]
    assert cases["link"][1] == ""
    assert (cases["name"][4], cases["state"][4]) == ("e_case", "unreadable")
    assert cases["reason"][4].startswith("run.json: ")
    assert str(out) not in (out / "report.html").read_text()


# Reading folders


def test_failures_are_read_from_the_summaries(tmp_path: Path) -> None:
    warned = DONE.model_copy(update={"warnings": ("another part of the body?",), "total_seconds": 12.5, "seconds": {}})
    write_result(tmp_path / "five", 0, keep=False, status=warned)
    write_result(tmp_path / "one", 0, keep=False)
    shards: list[list[tuple[str, State, str]]] = [
        [("one", "done", ""), ("two", "failed", "/x/y z/two.nii: damaged")],
        [("three", "left", "")],
    ]
    for number, cases in enumerate(shards, start=1):
        CohortRecord(
            version="0.1.0",
            device="cpu",
            model="builtin",
            workers=1,
            threads=None,
            cluster=None,
            counts={},
            wall_seconds=1.0,
            cases=tuple(
                CaseRecord(
                    case=name,
                    query=f"{name}.nii",
                    state=state,
                    kept=False,
                    reason=reason,
                    why="new",
                    attempts=1,
                    seconds=1.0,
                    peak_memory_mb=None,
                    warnings=(),
                )
                for name, state, reason in cases
            ),
        ).write(tmp_path / f"cohort-{number}-of-3.json")
    (tmp_path / "cohort-3-of-3.json").write_text('{"cases": {}}')
    found = read_folder(tmp_path)
    assert [(case.name, case.total_seconds) for case in found.cases] == [("five", 12.5), ("one", 4.0)]
    listed = [(one.name, one.state, one.reason) for one in found.failures]
    assert listed[1:] == [("three", "left", ""), ("two", "failed", "two.nii: damaged")]
    assert listed[0][:2] == ("cohort-3-of-3.json", "unreadable")
    text = write_report(tmp_path, options=ReportOptions(cases=False)).path.read_text()
    assert "another part of the body?" in text
    assert str(tmp_path) not in text
    assert re.search(r"cases left</span><b>1</b>", text)
    assert re.search(r"cases without</span><b>2</b>", text)


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no: found nothing, expected a folder"):
        read_folder(tmp_path / "no")
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match=r"no run\.json"):
        read_folder(tmp_path)
    write_result(tmp_path / "one", 0, keep=False)
    with pytest.raises(InputError, match=f"one: .*single case.* {re.escape(str(tmp_path))}"):
        read_folder(tmp_path / "one")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/Doe John/a.nii.gz: damaged", "a.nii.gz: damaged"),
        (r"C:\scans\Doe\a.nii: damaged", "a.nii: damaged"),
        ("the scan shows nothing and/or noise", "the scan shows nothing and/or noise"),
        ("", ""),
    ],
)
def test_reasons_lose_their_folders(text: str, shown: str) -> None:
    assert shown_reason(text) == shown


# Numbers


def test_outliers_are_far_from_the_rest_by_factors() -> None:
    usual = np.array([100.0, 104, 97, 110, 92, 101])
    assert not outliers(usual).any()
    assert outliers(np.append(usual, 300)).tolist() == [False] * 6 + [True]
    assert outliers(np.append(usual, 30)).tolist() == [False] * 6 + [True]
    assert not outliers(np.array([1.0, 1, 1, 100])).any()  # too few to say


def test_windows_of_ct_and_of_others() -> None:
    grid = straight_grid((20, 20, 20))
    data = np.full(grid.shape, -1000, np.float32)
    data[4:16, 4:16, 4:16] = 50
    data[8:10, 8:10, 8:10] = 1200
    image, box = Volume(data, grid), (slice(0, 20),) * 3
    assert is_hounsfield(image)
    assert structure_window(image, data == 50, box, hounsfield=True).name == "soft tissue, L 40 W 400 HU"
    assert structure_window(image, data == 1200, box, hounsfield=True).name.startswith("bone")
    assert structure_window(image, data == -1000, box, hounsfield=True).name.startswith("lung")
    other = Volume(data / 10 + 100, grid)
    assert not is_hounsfield(other)
    flat = structure_window(Volume(np.ones(grid.shape, np.float32), grid), data == 50, box, hounsfield=False)
    assert flat.high > flat.low


def test_planes_pass_through_the_largest_section() -> None:
    mask = np.zeros((6, 6, 6), bool)
    mask[1:5, 1:5, 4] = True
    mask[2, 2, :] = True
    panels = structure_panels(mask, (10, 10, 10), (40, 40, 40), np.array([1.0, 1.0, 1.0]))
    assert [panel.view.name for panel in panels] == ["axial", "coronal", "sagittal"]
    assert panels[0].index == 14
    assert panels[1].index == 12
    assert panels[2].index == 12


def unpacked(payload: str) -> Any:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(payload)))


def test_reduced_volumes_stay_in_their_place() -> None:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (5, -7, 11)
    grid = Grid((41, 40, 12), affine)
    x = np.moveaxis(np.indices(grid.shape), 0, -1)
    data = (x[..., 0] * 10).astype(np.float32)
    size = reduction(grid, 6000)
    assert np.prod(size.shape) <= 6000
    assert size.factors[2] == 1  # thick slices are not made thicker first
    scan = unpacked(scan_payload(Volume(data, grid), size))
    # 10 for each mm to the right of x = 5 mm, before and after.
    for ijk in ((3, 2, 1), (10, 5, 7)):
        world = scan.affine @ (*ijk, 1)
        assert float(scan.dataobj[ijk]) == pytest.approx(10 * (world[0] - 5), abs=3)
    labels = np.zeros(grid.shape, np.uint16)
    labels[20:, :, :] = 900
    small = unpacked(labels_payload(Volume(labels, grid), [3, 900], size))
    assert small.get_data_dtype() == np.uint8
    assert set(np.unique(small.dataobj)) == {0, 2}
    assert np.allclose(small.affine, scan.affine)
    assert not bytes(small.header["descrip"]).strip(b"\0")


def test_niivue_is_the_published_file_with_its_licence() -> None:
    assets = resources.files("atlassegfm.report") / "assets"
    digest = hashlib.sha256((assets / "niivue.umd.js").read_bytes()).hexdigest()
    assert digest == "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
    assert "BSD 2-Clause License" in (assets / "NIIVUE-LICENSE.txt").read_text()


def test_a_thousand_cases_fit_into_a_page(tmp_path: Path) -> None:
    volumes = {one.value: 10.0 + one.value for one in STRUCTURES}
    for number in range(1000):
        folder = tmp_path / f"case_{number:04d}"
        folder.mkdir()
        volumes[1] = 10 + 2 * np.sin(number)
        run_record(folder.name, volumes).write(folder / "run.json")
    written = write_report(tmp_path, options=ReportOptions(cases=False))
    assert written.cases == 1000
    assert written.path.stat().st_size < 1_500_000


# The command


def test_command_writes_pages_and_pictures(cohort: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    shutil.copytree(cohort[0] / "a_case", out / "a_case")
    done = run("report", out, "--images", cohort[1], "--viewer-voxels", 0, "--title", "A title", "--json", "-q")
    assert done.code == 0, done.err
    assert done.json["cases"] == 1
    assert done.json["without_image"] == 0
    assert (out / "a_case" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>A title</h1>" in (out / "report.html").read_text()
    assert 'id="niivue"' not in (out / "a_case" / "report.html").read_text()
    # A page elsewhere finds its cases.
    done = run("report", out, "-o", tmp_path / "page.html", "--no-picture", "-q")
    assert done.out.count("--images") == 1  # the page with the scan is kept
    assert data_of(tmp_path / "page.html", "table-data")["cases"]["link"] == ["out/a_case/report.html"]
    done = run("report", tmp_path / "nothing")
    assert done.code == 2
    assert "expected a folder of results" in done.err


def test_segment_ends_in_a_report(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    grid = straight_grid((32, 28, 24), (3.0, 3.0, 3.0))
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(grid), tmp_path / "query.nii.gz")
    command = ["segment", "--atlas", tmp_path / "atlas.nii.gz", "--labels", tmp_path / "labels.nii.gz"]
    command += [tmp_path / "query.nii.gz", "-o", tmp_path / "out", "--report", "-q", "--model", "none"]
    for setting in UNREGISTERED:
        command += ["--set", setting]
    for _ in range(2):  # the report does not prevent a second run
        done = run(*command)
        assert done.code == 0, done.err
        volumes = data_of(tmp_path / "out" / "query" / "report.html", "viewer-data")["volumes"]
        assert set(volumes) == {"scan", "result", "atlas"}
        assert (tmp_path / "out" / "report.html").is_file()


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: looked for {', '.join(names)}")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page without a network that must end without an error."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, offline=True)
    context.set_default_timeout(60_000)
    context.route(re.compile("^(?!file:|data:|blob:)"), lambda route: route.abort())
    opened = context.new_page()
    problems: list[str] = []
    opened.on(
        "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("requestfailed", lambda request: problems.append(request.url[:80]))
    yield opened
    context.close()
    # Software rendering is slow, and says so.
    assert [problem for problem in problems if "GPU stall" not in problem] == []


def column(page: Any, number: int) -> list[str]:
    found: list[str] = page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()
    return found


def test_table_sorts_and_filters(cohort: tuple[Path, Path], page: Any) -> None:
    page.goto((cohort[0] / "report.html").as_uri())
    assert column(page, 1) == ["a_case", "b_case", "c case & <i>", "d_case"]
    page.click("#table thead th:nth-child(1) button")
    assert column(page, 1) == ["d_case", "c case & <i>", "b_case", "a_case"]
    page.click("#table thead th:nth-child(2) button")
    assert column(page, 2) == ["failed", "review", "good", "-"]
    assert page.get_attribute("#table thead th:nth-child(2)", "aria-sort") == "ascending"
    page.select_option("#verdict", "review")
    assert column(page, 1) == ["b_case", "c case & <i>"]
    page.click("[data-tab=structures]")
    assert len(column(page, 1)) == 2
    page.select_option("#verdict", "")
    assert len(column(page, 1)) == 9
    page.select_option("#structure", "7")
    assert column(page, 2) == ["kidney"] * 3
    page.fill("#search", "because REVIEW")
    assert column(page, 1) == ["b_case"]
    assert page.inner_text("#count") == "1 of 9 structures"
    page.click("#table tbody tr th a")
    assert page.url.endswith("b_case/report.html#s7")


def canvas_picture(page: Any) -> Any:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")).astype(int)


@pytest.mark.slow
def test_case_page_shows_volumes_and_hides_outlines(cohort: tuple[Path, Path], page: Any) -> None:
    page.goto((cohort[0] / "a_case" / "report.html").as_uri())
    page.wait_for_selector("body[data-viewer]")
    assert page.get_attribute("body", "data-viewer") == "ready"
    page.wait_for_timeout(300)
    planes = canvas_picture(page)
    assert planes.std() > 20
    # Grey where the scan is alone, coloured where the result lies over it.
    coloured = np.ptp(planes, axis=2) > 60
    assert 0.01 < coloured.mean() < 0.6
    page.uncheck("[data-layer=result]")
    page.wait_for_timeout(200)
    bare = np.ptp(canvas_picture(page), axis=2) > 60
    assert bare.mean() < 0.2 * coloured.mean()
    page.check("[data-layer=model]")
    page.wait_for_timeout(200)
    blue = canvas_picture(page)
    assert ((blue[..., 2] - blue[..., 0]) > 50).mean() > 0.005
    page.check("[data-layer=result]")
    page.click("[data-layout=render]")
    page.wait_for_timeout(300)
    solid = canvas_picture(page)
    assert (np.ptp(solid, axis=2) > 60).mean() > 0.005
    page.click("a[data-value='12']")
    assert page.inner_text("#where").startswith("node")
    line = page.locator(".slices path.atlas").first
    assert line.is_visible()
    page.uncheck("[data-lines=atlas]")
    assert not line.is_visible()
    assert page.locator(".slices path.result").first.is_visible()


@pytest.mark.slow
def test_canvas_has_the_proportions_of_what_it_shows(cohort: tuple[Path, Path], page: Any) -> None:
    page.goto((cohort[0] / "a_case" / "report.html").as_uri())
    page.wait_for_selector("body[data-viewer=ready]")
    x, y, z = (np.array(QUERY.scan(straight_grid()).grid.shape) * straight_grid().spacing_mm).tolist()
    for width in (1100, 600):
        page.set_viewport_size({"width": width, "height": 800})
        for layout, proportion in (("multi", (x + y) / (y + z)), ("coronal", x / z)):
            page.click(f"[data-layout={layout}]")
            page.wait_for_timeout(300)
            box = page.locator("#canvas").bounding_box()
            assert box["width"] / box["height"] == pytest.approx(proportion, rel=0.02)
            picture = canvas_picture(page)
            assert (picture.std(axis=(0, 2)) < 3).mean() < 0.05  # columns with nothing in them
            # Lines of the crosshair, px.
            across = (
                "nv => nv.opts.crosshairWidth * nv.screenSlices[0].leftTopWidthHeight[2] / nv.screenSlices[0].fovMM[0]"
            )
            assert 0.8 < abs(page.evaluate(f"({across})(window.atlassegfmViewer)")) < 2.5
    page.click(".names button >> text=node")
    assert page.inner_text("#where").startswith("node")


def test_page_is_readable_in_the_dark(cohort: tuple[Path, Path], page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto((cohort[0] / "report.html").as_uri())
    ink, paper = (
        page.evaluate("name => getComputedStyle(document.body)[name]", name) for name in ("color", "backgroundColor")
    )
    brightness = [sum(map(int, re.findall(r"\d+", value)[:3])) for value in (ink, paper)]
    assert brightness[0] > 600
    assert brightness[1] < 100
