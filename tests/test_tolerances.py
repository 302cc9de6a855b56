"""NSD tolerances: presets, files, and which of their patterns counts for a structure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm.core.errors import InputError
from atlassegfm.evaluate import tolerances as package
from atlassegfm.evaluate.tolerances import PRESETS, Tolerances, load_tolerances, uniform


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@given(st.floats(0, 1e6), st.integers(1), st.text())
def test_uniform(tolerance_mm: float, value: int, name: str) -> None:
    assert uniform(tolerance_mm).of(value, name) == tolerance_mm


def test_origin() -> None:
    assert uniform(2).origin == "2 mm for all"
    assert uniform(1.5).origin == "1.5 mm for all"
    assert load_tolerances("flare22").origin == "preset flare22"


def test_values_before_names_before_patterns(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        default_mm = 2
        source = "two readers"
        [tolerance_mm]
        "*kidney*" = 3
        "left*" = 4
        "Left Kidney" = 5.5
        7 = 6
        "*" = 7
        """,
    )
    tolerances = load_tolerances(path)
    assert (tolerances.origin, tolerances.source) == (path, "two readers")
    assert tolerances.of(1, "right_kidney") == 3
    assert tolerances.of(1, "left_renal_kidney") == 3
    assert tolerances.of(1, "left_lung") == 4
    assert tolerances.of(1, "left-kidney") == 5.5
    assert tolerances.of(7, "left_kidney") == 6
    assert tolerances.of(1, "liver") == 7
    assert isinstance(tolerances.of(7, "left_kidney"), float)


def test_default(tmp_path: Path) -> None:
    assert load_tolerances(written(tmp_path, "default_mm = 2.5")).of(1, "liver") == 2.5


def test_unmatched() -> None:
    tolerances = Tolerances(2.0, (("livr", 5.0), ("*kidney*", 3.0), ("9", 1.0), ("4", 1.0)), "mine.toml")
    # Structures may be given as any iterable, once through.
    assert tolerances.unmatched(iter([(1, "liver"), (2, "left_kidney"), (4, "spleen")])) == ("livr", "9")
    assert tolerances.unmatched(()) == ("livr", "*kidney*", "9", "4")


@pytest.mark.parametrize("tolerance_mm", [-1, math.nan, math.inf])
def test_numbers_that_are_no_tolerance(tolerance_mm: float) -> None:
    with pytest.raises(InputError, match=rf"'default_mm' is {tolerance_mm}"):
        uniform(tolerance_mm)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", ["no default_mm"]),
        ("default_mm = true", ["'default_mm' is True"]),
        ("default_mm = '2'", ["'default_mm' is '2'"]),
        ("default_mm = 2\n[tolerance_mm]\nliver = -0.5", ["'liver' is -0.5", "at least 0"]),
        ("default_mm = 2\n[tolerance_mm]\nliver.left = 1", ["'liver' is {'left': 1}"]),
        ("default_mm = 2\n[tolerance_mm]\n' ' = 1", ["' ' names no structure"]),
        ("default_mm = 2\n[tolerance_mm]\nleft_kidney = 1\n'Left kidney' = 1", ["'left_kidney'", "'Left kidney'"]),
        ("default_mm = 2\nliver = 5", ["'liver'", "default_mm, tolerance_mm, source"]),
        ("default_mm = 2\ntolerance_mm = 3", ["tolerance_mm is 3", "[tolerance_mm]"]),
        ("default_mm = 2\nsource = 3", ["source is 3"]),
        ("default_mm 2", ["not valid TOML", "line 1"]),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, facts: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_tolerances(path)
    assert str(caught.value).startswith(path)
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_neither_preset_nor_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^flare: .*flare22, kits21, nikolov"):
        load_tolerances("flare")
    with pytest.raises(InputError, match="cannot be opened"):
        load_tolerances(str(tmp_path))


def test_file_with_the_name_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flare22").write_text("default_mm = 9")
    assert load_tolerances("flare22").default_mm == 2
    assert load_tolerances("./flare22").default_mm == 9


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_they_are_from(name: str) -> None:
    preset = load_tolerances(name)
    assert preset.default_mm == 2
    assert preset.source
    assert preset.patterns


def test_every_file_is_a_preset() -> None:
    folder = Path(package.__file__).parent
    assert {path.name for path in folder.glob("*.toml")} == set(PRESETS.values())


@pytest.mark.parametrize(
    ("preset", "tolerance_mm", "names"),
    [
        ("flare22", 5, "liver, Pancreas, stomach"),
        ("flare22", 3, "left_kidney, right kidney, kidney_left, RK, spleen, esophagus, Oesophagus"),
        ("flare22", 2, "aorta, inferior_vena_cava, IVC, postcava, left_adrenal_gland, LAG, Gall Bladder, gallbladder"),
        ("flare22", 2, "kidney_tumor, portal_and_splenic_vein, bladder"),
        ("flare22", 7, "duodenum"),
        ("nikolov", 1.01, "Brain, whole_brain, mandible, Bone_Mandible"),
        ("nikolov", 2.5, "Brainstem, brain_stem, OpticNerve_L, OpticNrv_R, left optic nerve, optic_nerve_right"),
        ("nikolov", 1.25, "Cochlea_L, left_cochlea"),
        ("nikolov", 0.98, "Lens_R, eye_lens_left, lens"),
        ("nikolov", 2.85, "Parotid_L, right parotid gland, Glnd_Parotid_R"),
        ("nikolov", 2.93, "SpinalCord, spinal_cord"),
        ("nikolov", 2.02, "Glnd_Submand_L, left-submandibular-gland"),
        ("nikolov", 2, "spinal_canal, midbrain, OpticChiasm"),
        ("kits21", 1.0330772532390826, "kidney, left_kidney, kidney_and_mass, kidney and masses"),
        ("kits21", 1.1498198361434828, "tumor, kidney_tumor, Tumour"),
        ("kits21", 1.1328796488598762, "mass, masses, cyst, kidney_cyst"),
    ],
)
def test_presets(preset: str, tolerance_mm: float, names: str) -> None:
    tolerances = load_tolerances(preset)
    assert {name: tolerances.of(99, name) for name in names.split(", ")} == dict.fromkeys(
        names.split(", "), tolerance_mm
    )
