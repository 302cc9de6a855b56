"""What every model of the table promises, whatever it is made of: the protocol ``Segmenter``, with tiny weights.

A model is added here by one line of :data:`TINY`. What it finds is tested in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import tiny_litemedsam
import tiny_medsam2
import tiny_nninteractive
import tiny_vesselfm
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Source, Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.models import MODELS, Segmenter, litemedsam, load_model
from atlassegfm.prompts import Prompt, PromptKind, make_prompt
from atlassegfm.settings import Settings
from conftest import affine_of, rotation


@dataclass(frozen=True)
class Tiny:
    """How a model is made fit for a test.

    Parameters
    ----------
    make_weights : callable or None
        Writes tiny random weights below a folder and gives their file or folder; None for a model without any.
    overrides : tuple of str
        Settings, as "key=value".
    """

    make_weights: Callable[[Path], Path] | None = None
    overrides: tuple[str, ...] = ()


#: One line for each row of MODELS.
TINY = {
    "builtin": Tiny(),
    "nninteractive": Tiny(tiny_nninteractive.make_folder, ("models.nninteractive.autozoom=false",)),
    "medsam2": Tiny(lambda root: tiny_medsam2.make_checkpoint(root / "MedSAM2_latest.pt")),
    "litemedsam": Tiny(lambda root: tiny_litemedsam.make_checkpoint(root / "lite_medsam.pth")),
    "vesselfm": Tiny(
        lambda root: tiny_vesselfm.make_checkpoint(root / "vesselFM_base.pt"), ("models.vesselfm.window=64",)
    ),
}

CASES = [(name, kind) for name, row in MODELS.items() for kind in row.prompts]
every_model = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])

SHAPE = (40, 30, 26)
SPACING_MM = (1.5, 2.0, 2.5)
GRID = Grid(SHAPE, affine_of(np.diag(SPACING_MM), (-20.0, 30.0, 7.0)))
#: Centres and radius of two bright balls, more than twice any model's reach apart: each is answered for itself.
CENTRES = {3: (8, 8, 6), 11: (31, 22, 19)}
RADIUS_MM = 9.0
#: Probabilities of grids that differ in the last bit of their spacing.
TOLERANCE = 1e-3


def ball(centre: tuple[int, int, int]) -> np.ndarray:
    places = (np.moveaxis(np.indices(SHAPE), 0, -1) - centre) * SPACING_MM
    return (places**2).sum(axis=-1) <= RADIUS_MM**2


def scan(seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).normal(100, 8, SHAPE)
    data[np.any([ball(centre) for centre in CENTRES.values()], axis=0)] += 90
    return Volume(data.astype(np.float32), GRID)


def prompt(kind: PromptKind, mask: LocalMap) -> Prompt:
    made = make_prompt(kind, mask)
    assert made is not None
    return made


def prompts(kind: PromptKind) -> dict[int, Prompt]:
    """Of the two balls, as a warped atlas would have them: a voxel off."""
    return {
        number: prompt(kind, LocalMap.from_full(np.roll(ball(centre), 1, axis=0).astype(np.float32)))
        for number, centre in CENTRES.items()
    }


class Models:
    """The models with tiny weights; each is loaded once, and its answer about the scan as it is computed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[str, Segmenter] = {}
        self._answers: dict[tuple[str, PromptKind], dict[int, LocalMap]] = {}
        self._paths: dict[str, Path] = {}

    def fresh(self, name: str) -> Segmenter:
        """The model, loaded anew."""
        if name not in TINY:
            pytest.fail(f"the model {name!r} has no line in the table TINY of {__name__}")
        tiny = TINY[name]
        if tiny.make_weights is not None and name not in self._paths:
            folder = self._root / name
            folder.mkdir()
            self._paths[name] = tiny.make_weights(folder)
        settings = with_overrides(Settings(), tiny.overrides)
        return load_model(name, "cpu", settings.models, self._paths.get(name))

    def path(self, name: str) -> Path:
        """Of its tiny weights."""
        self.loaded(name)
        return self._paths[name]

    def loaded(self, name: str) -> Segmenter:
        if name not in self._loaded:
            self._loaded[name] = self.fresh(name)
        return self._loaded[name]

    def answers(self, name: str, kind: PromptKind) -> dict[int, LocalMap]:
        if (name, kind) not in self._answers:
            model = self.loaded(name)
            self._answers[name, kind] = model.predict(model.encode(scan()), prompts(kind))
        return self._answers[name, kind]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of LiteMedSAM takes pictures of any size; on those of 256 the tests would take minutes."""
    monkeypatch.setattr(litemedsam, "IMAGE_SIZE", 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def check_map(found: LocalMap, shape: tuple[int, int, int] = SHAPE) -> None:
    assert found.values.dtype == np.float32
    if found.values.size:
        assert min(found.start) >= 0
        assert all(stop <= count for stop, count in zip(found.stop, shape, strict=True))
        assert np.isfinite(found.values).all()
        assert found.values.min() >= 0
        assert found.values.max() <= 1


def check_equal(one: LocalMap, other: LocalMap) -> None:
    np.testing.assert_array_equal(one.to_full(SHAPE), other.to_full(SHAPE))


def test_every_model_is_tested() -> None:
    assert set(TINY) == set(MODELS)
    assert all((tiny.make_weights is None) == (MODELS[name].weights is None) for name, tiny in TINY.items())


@every_model
def test_gives_probabilities_on_the_scan(models: Models, name: str, kind: PromptKind) -> None:
    answers = models.answers(name, kind)
    assert set(answers) == set(CENTRES)
    for found in answers.values():
        check_map(found)


@every_model
def test_sees_the_patient_and_not_the_array(models: Models, name: str, kind: PromptKind) -> None:
    """The same patient in two array orders; what comes out is the same at every point of the world."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    model, expected = models.loaded(name), models.answers(name, kind)
    turned = affine_of(rotation(7, -9, 12) @ np.diag(SPACING_MM), (5.0, -6.0, 70.0))
    for codes in ("SRA", "oblique"):
        patient = scan() if codes != "oblique" else Volume(scan().data, Grid(SHAPE, turned))
        order = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("ASL" if codes == "oblique" else codes))
        i, j, k = (SHAPE[int(np.flatnonzero(order[:, 0] == axis)[0])] for axis in range(3))
        stored = patient.turned_to(Grid((i, j, k), patient.grid.affine @ inv_ornt_aff(order, SHAPE)))
        stored = Volume(np.ascontiguousarray(stored.data), stored.grid)
        canonical = stored.canonical()
        answers = model.predict(model.encode(canonical), prompts(kind))
        points_mm = patient.grid.voxel_to_world(np.argwhere(np.ones(SHAPE, bool)))
        for number, found in answers.items():
            check_map(found)
            back = Volume(found.to_full(SHAPE), canonical.grid).turned_to(stored.grid)
            ijk = np.rint(back.grid.world_to_voxel(points_mm)).astype(int)
            there = back.data[tuple(ijk.T)].reshape(SHAPE)
            np.testing.assert_allclose(there, expected[number].to_full(SHAPE), rtol=0, atol=TOLERANCE, err_msg=codes)


@pytest.mark.parametrize("name", MODELS)
def test_says_where_its_numbers_come_from(models: Models, name: str) -> None:
    """For run.json: one shape for all, and no folder of this machine in it."""
    told = models.loaded(name).provenance
    if MODELS[name].weights is None:
        assert "weights" not in told
        return
    path = models.path(name)
    file = path if path.is_file() else next(one for one in path.rglob(told["weights"]["file"]))
    content = file.read_bytes()
    assert told["weights"].items() >= {
        ("file", file.name),
        ("bytes", len(content)),
        ("sha256", hashlib.sha256(content).hexdigest()),
    }
    assert [key for key in told if key != "weights" and not key.endswith("_version")] == []
    assert len(told) > 1
    assert str(path.parent) not in json.dumps(told)


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.weights is not None])
def test_scan_that_shows_nothing(models: Models, name: str) -> None:
    model = models.loaded(name)
    for data, message in (
        (np.full(SHAPE, 7.0), "all voxels have the value 7; expected a scan with contrast"),
        (np.where(ball(CENTRES[3]), np.nan, 1.0), "there are NaN or infinite voxels"),
        (np.where(ball(CENTRES[3]), np.inf, 1.0), "there are NaN or infinite voxels"),
    ):
        for source, called in ((None, "the scan"), (Source(Path("flat.nii.gz")), "flat.nii.gz")):
            with pytest.raises(InputError, match=f"^{called}: {message}"):
                model.encode(Volume(data.astype(np.float32), GRID, source))


@every_model
def test_nothing_asked_nothing_answered(models: Models, name: str, kind: PromptKind) -> None:
    model = models.loaded(name)
    assert model.predict(model.encode(scan()), {}) == {}


@every_model
@pytest.mark.parametrize("voxel", [(0, 0, 0), (39, 29, 25)])
def test_prompt_on_the_border(models: Models, name: str, kind: PromptKind, voxel: tuple[int, int, int]) -> None:
    model = models.loaded(name)
    answers = model.predict(model.encode(scan()), {1: prompt(kind, LocalMap(voxel, np.ones((1, 1, 1), np.float32)))})
    check_map(answers[1])


@every_model
@pytest.mark.parametrize("start", [(200, 8, 8), (8, -30, 8), (8, 8, 26)])
def test_structure_outside_the_scan(models: Models, name: str, kind: PromptKind, start: tuple[int, int, int]) -> None:
    model = models.loaded(name)
    outside = prompt(kind, LocalMap(start, np.ones((5, 5, 3), np.float32)))
    found = model.predict(model.encode(scan()), {6: outside})[6]
    check_map(found)
    assert not (found.values >= 0.5).any()


@every_model
def test_structure_by_structure_is_the_same(models: Models, name: str, kind: PromptKind) -> None:
    """One encoded scan answers for several structures, at once or one by one, in any order."""
    model, together = models.loaded(name), models.answers(name, kind)
    encoded = model.encode(scan())
    for number in sorted(CENTRES, reverse=True):
        alone = model.predict(encoded, {number: prompts(kind)[number]})
        assert set(alone) == {number}
        check_equal(alone[number], together[number])


@every_model
def test_the_same_twice(models: Models, name: str, kind: PromptKind) -> None:
    """To the last bit, from the same model and from one loaded anew, and whatever random numbers others draw."""
    import torch

    expected = models.answers(name, kind)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    try:
        for model in (models.loaded(name), models.fresh(name)):
            for number, found in model.predict(model.encode(scan()), prompts(kind)).items():
                check_equal(found, expected[number])
    finally:
        torch.set_rng_state(state)


@every_model
def test_two_scans_in_turn(models: Models, name: str, kind: PromptKind) -> None:
    """As the pipeline does it: the query, the atlas, and the query again."""
    model, expected = models.loaded(name), models.answers(name, kind)
    other = Volume(np.ascontiguousarray(scan(1).data[::-1, :24]), Grid((40, 24, 26), GRID.affine))
    number = min(CENTRES)
    asked = {number: prompts(kind)[number]}
    fresh = models.fresh(name)
    alone = fresh.predict(fresh.encode(other), asked)[number]
    first, second = model.encode(scan()), model.encode(other)
    for _ in range(2):
        check_equal(model.predict(first, asked)[number], expected[number])
        found = model.predict(second, asked)[number]
        check_map(found, other.grid.shape)
        np.testing.assert_array_equal(found.to_full(other.grid.shape), alone.to_full(other.grid.shape))


@every_model
def test_tells_each_structure_once_and_writes_to_nothing(models: Models, name: str, kind: PromptKind) -> None:
    model, image, asked = models.loaded(name), scan(), prompts(kind)
    told: list[int] = []
    model.predict(model.encode(image), asked, told.append)
    assert sorted(told) == sorted(CENTRES)
    np.testing.assert_array_equal(image.data, scan().data)
    for number, one in prompts(kind).items():
        if kind in ("mask", "region"):
            np.testing.assert_array_equal(asked[number].probability.values, one.probability.values)
