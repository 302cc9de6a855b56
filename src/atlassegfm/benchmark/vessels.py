"""Made vascular trees as CT angiography shows them: the same branches in every subject, and nothing else the same.

A seed decides how a tree branches: a trunk of 6 mm radius, two legs, and side branches that divide twice, down to 1.3
mm, all of them winding. A subject has directions, lengths and calibres of its own, a smooth deformation, a pose,
contrast, noise and voxel size. Around the vessels lie fat, muscle, organs, vertebrae as bright as a vessel, and veins
beside the arteries, which are not labelled.

Positions are in RAS+ mm of a reference body; a subject maps its own world to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from ..core.files import disk_errors, write_text
from ..core.geometry import Grid
from ..core.image import Volume, save_volume
from ..core.labels import Structure
from .protocols import Pair

Points = NDArray[np.float64]
Floats = NDArray[np.float64]

VESSELS = Structure(1, "vessels", (214, 69, 65))
#: Half axes of the body, an elliptic cylinder, and half sides of the field of view.
_BODY_MM, _VIEW_MM = (62.0, 46.0), (68.0, 52.0, 62.0)
#: Where the trunk begins, and the place of a vein beside its artery.
_TRUNK_MM, _VEIN_SHIFT_MM = (0.0, -6.0, 68.0), (9.0, 4.0, -4.0)
#: Distance of the points along a vessel.
_STEP_MM = 0.4
#: Standard deviations between subjects: of a direction (radians), and of the logarithms of length and radius.
_TURN, _STRETCH, _CALIBRE = 0.12, 0.08, 0.08
#: Sinusoids of a subject's deformation: number, amplitude, and shortest and longest wavelength.
_WAVES, _AMPLITUDE_MM, _WAVELENGTHS_MM = 4, 3.0, (70.0, 140.0)
#: Pose of a subject, standard deviations: rotation about each axis (degrees), shift, logarithm of the scale.
_ROTATION_DEG, _SHIFT_MM, _SCALE = 4.0, 6.0, 0.04
#: Centre, half axes and Hounsfield units of organs; vertebrae and discs are in turn along an axis.
_ORGANS = (
    ((30.0, 12.0, 34.0), (26.0, 25.0, 26.0), 110.0),
    ((36.0, -20.0, -14.0), (13.0, 11.0, 20.0), 150.0),
    ((-36.0, -20.0, -8.0), (13.0, 11.0, 20.0), 150.0),
    ((-30.0, 8.0, 36.0), (20.0, 22.0, 20.0), 95.0),
)
_SPINE_MM, _VERTEBRA_MM = (0.0, -30.0, 13.0), 26.0
_AIR, _FAT, _MUSCLE, _BONE, _DISC, _VEIN, _LUMEN = -1000.0, -90.0, 50.0, 330.0, 90.0, 140.0, 330.0
#: Contrast falls to this fraction towards the ends, where the vessel has the smaller radius.
_THINNEST_MM, _FADED = 1.3, 0.75


@dataclass(frozen=True)
class Branch:
    """One vessel of a tree: where it leaves which parent, how it runs, and how thick it is."""

    parent: int  # position in the tree; -1 for the trunk
    place: float  # on the parent, from 0 at its beginning to 1 at its end
    direction: tuple[float, ...]
    length_mm: float
    radii_mm: tuple[float, float]  # at its beginning and end
    winding: tuple[float, float, float]  # amplitude in mm, periods over its length, phase

    def varied(self, random: np.random.Generator) -> Branch:
        """Draw the same vessel of another subject; the trunk differs less."""
        rigour = 0.3 if self.parent < 0 else 1.0
        direction = _unit(self.direction + random.normal(0, rigour * _TURN, 3))
        stretch, calibre, wider, phase, place = random.normal(0, 1, 5)
        radius, end = (radius * float(np.exp(_CALIBRE * calibre)) for radius in self.radii_mm)
        amplitude, periods, start = self.winding
        return replace(
            self,
            place=self.place if self.place in (0, 1) else float(np.clip(self.place + 0.03 * place, 0.05, 0.98)),
            direction=direction,
            length_mm=self.length_mm * float(np.exp(rigour * _STRETCH * stretch)),
            radii_mm=(radius, max(end, 0.9 * _THINNEST_MM)),
            winding=(amplitude * float(np.exp(0.2 * wider)), periods, start + 0.5 * rigour * phase),
        )

    def course(self, start: Points) -> tuple[Points, Floats]:
        """(N, 3) points along the vessel from ``start`` on, and its radius at each, (N,)."""
        along = np.linspace(0, 1, int(self.length_mm / _STEP_MM) + 2)
        amplitude, periods, phase = self.winding
        forward = np.array(self.direction)
        sideways = np.cross(forward, (0.0, 1.0, 0.0) if abs(forward[1]) < 0.8 else (1.0, 0.0, 0.0))
        sideways /= np.linalg.norm(sideways)
        # A helix that begins on the parent: both amplitudes rise from 0.
        turn, rise = 2 * np.pi * periods * along + phase, amplitude * np.sin(np.pi * along / 2)[:, None]
        offset = np.sin(turn)[:, None] * sideways + np.cos(turn)[:, None] * np.cross(forward, sideways)
        first, last = self.radii_mm
        return start + along[:, None] * self.length_mm * forward + rise * offset, first + (last - first) * along


def make_branches(seed: int) -> tuple[Branch, ...]:
    """Draw the branches of a tree: the trunk first, each one after its parent."""
    random = np.random.default_rng((seed, 0))

    def winding(amplitude_mm: float) -> tuple[float, float, float]:
        return amplitude_mm * random.uniform(0.6, 1.4), random.uniform(0.8, 1.5), random.uniform(0, 2 * np.pi)

    branches = [Branch(-1, 0.0, (0.0, 0.0, -1.0), 84.0, (6.5, 5.0), winding(2.5))]
    for side in (-1, 1):
        direction = _unit(np.array((0.6 * side, 0.2, -1.0)))
        branches.append(Branch(0, 1.0, direction, random.uniform(38, 46), (3.8, 3.0), winding(2.5)))

    def divide(parent: int, generation: int) -> None:
        """Add two vessels at the end of a parent, and so on."""
        thick = branches[parent]
        across = _unit(np.cross(thick.direction, random.normal(0, 1, 3)))
        for side in (-1, 1):
            direction = _unit(np.array(thick.direction) + side * random.uniform(0.5, 0.8) * np.array(across))
            radius = max(random.uniform(0.72, 0.82) * thick.radii_mm[1], _THINNEST_MM)
            radii = radius, max(0.85 * radius, _THINNEST_MM)
            length = random.uniform(0.6, 0.8) * thick.length_mm
            branches.append(Branch(parent, 1.0, direction, length, radii, winding(1.2)))
            if generation > 1:
                divide(len(branches) - 1, generation - 1)

    places = np.linspace(0.2, 0.85, 4) + random.uniform(-0.06, 0.06, 4)
    for place, side in zip(places, random.permutation((-1, 1, -1, 1)), strict=True):
        direction = _unit(np.array((side, random.uniform(0.1, 0.9), random.normal(0, 0.3))))
        radius = random.uniform(2.5, 3.1)
        branches.append(
            Branch(0, float(place), direction, random.uniform(19, 25), (radius, 0.8 * radius), winding(2.0))
        )
        divide(len(branches) - 1, 2)
    return tuple(branches)


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject with the tree of ``seed``; ``number`` counts the subjects with that tree from 0 on."""

    seed: int
    number: int

    @property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, 1, self.number))

    @cached_property
    def vessels(self) -> tuple[tuple[Points, Floats], ...]:
        """Points, (N, 3), along each vessel in the reference body, and radii there, (N,); the trunk first."""
        random, courses = self._random, list[tuple[Points, Floats]]()
        for branch in make_branches(self.seed):
            start = np.array(_TRUNK_MM)
            if branch.parent >= 0:
                points, _ = courses[branch.parent]
                start = points[round(branch.place * (len(points) - 1))]
            courses.append(branch.varied(random).course(start))
        return tuple(courses)

    def to_reference(self, points_mm: Points) -> Points:
        """Map (N, 3) points of the subject's world to the reference body, RAS+ mm."""
        random = np.random.default_rng((self.seed, 2, self.number))
        turn = Rotation.from_euler("xyz", random.normal(0, _ROTATION_DEG, 3), degrees=True)
        shift, scale = random.normal(0, _SHIFT_MM, 3), np.exp(random.normal(0, _SCALE))
        posed: Points = turn.apply(points_mm - shift) * scale
        moved = posed.copy()
        for _ in range(_WAVES):
            across, along = random.normal(0, 1, (2, 3))
            wave = 2 * np.pi / random.uniform(*_WAVELENGTHS_MM) * np.array(_unit(across))
            moved += _AMPLITUDE_MM * np.sin(posed @ wave + random.uniform(0, 2 * np.pi))[:, None] * _unit(along)
        return moved

    def grid(self, coarser: float = 1.0) -> Grid:
        """Make the voxels of the subject's scan: 1.0 to 1.3 mm in a slice, 1.5 to 2.1 mm between them, or coarser."""
        random = np.random.default_rng((self.seed, 3, self.number))
        inside, between = random.uniform(1.0, 1.3), random.uniform(1.5, 2.1)
        spacing = coarser * np.array((inside, inside, between))
        shape = np.ceil(2 * np.array(_VIEW_MM) / spacing).astype(int)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -spacing * (shape - 1) / 2
        return Grid(tuple(shape.tolist()), affine)

    def scan(self, grid: Grid) -> tuple[Volume, Volume]:
        """Make the scan, float32 in Hounsfield units, and its labels, uint8, on a grid.

        A label is at least as thick as the diagonal of a voxel, so that no vessel is torn.
        """
        random = np.random.default_rng((self.seed, 4, self.number))
        points = self.to_reference(grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3)))
        spacing, edge_mm = grid.spacing_mm, float(grid.spacing_mm.mean())
        data = _tissue(points, random).reshape(grid.shape)
        # Texture of the tissue, a few mm in size.
        data += _blurred_noise(random, grid, 3.0) * np.where(data > _AIR, 14.0, 0.0)
        level = random.normal(1, 0.08)
        veins = [(course + _VEIN_SHIFT_MM, 1.15 * radii) for course, radii in self.vessels]
        least_mm = 0.55 * float(np.linalg.norm(spacing))
        for courses, value in ((veins, _VEIN), (self.vessels, _LUMEN * level)):
            depth, radius = _depth(points, courses, max(edge_mm, least_mm))
            occupied = np.clip(depth / edge_mm + 0.5, 0, 1).reshape(grid.shape)
            faded = np.clip((radius - _THINNEST_MM) / 2, 0, 1) * (1 - _FADED) + _FADED
            data += occupied * (value * faded.reshape(grid.shape) - data)
        labels = ((radius > 0) & (depth >= np.minimum(radius - least_mm, 0))).reshape(grid.shape)
        data = ndimage.gaussian_filter(data, 0.6 / spacing) + _blurred_noise(random, grid, 0.7) * random.uniform(14, 24)
        return Volume(data.astype(np.float32), grid), Volume(labels.astype(np.uint8), grid)


def tree_pairs(seeds: Sequence[int], subjects: int = 2) -> tuple[Pair, ...]:
    """Make all pairs of subjects with one tree, by the names of their scans."""
    return tuple(
        Pair(_name(seed, one), _name(seed, other))
        for seed in seeds
        for one in range(subjects)
        for other in range(subjects)
        if one != other
    )


def write_trees(
    folder: Path, seeds: Sequence[int], subjects: int = 2, *, coarser: float = 1.0, again: bool = False
) -> None:
    """Write a dataset in nnU-Net raw layout with subjects of each tree.

    ``coarser`` enlarges the voxels. A seed always makes the same scans: what is there stays, unless ``again``. Raises
    InputError if the folder cannot be written.
    """
    with disk_errors(folder):
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for number in range(subjects):
            name = _name(seed, number)
            files = folder / "imagesTr" / f"{name}_0000.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"
            if again or not all(file.exists() for file in files):
                subject = Subject(seed, number)
                image, labels = subject.scan(subject.grid(coarser))
                save_volume(replace(image, data=np.rint(image.data).astype(np.int16)), files[0])
                save_volume(labels, files[1], structures=[VESSELS])
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, VESSELS.name: VESSELS.value},
        "numTraining": len(list((folder / "labelsTr").glob("*.nii.gz"))),
        "file_ending": ".nii.gz",
    }
    write_text(folder / "dataset.json", json.dumps(content, indent=1) + "\n")


def _name(seed: int, number: int) -> str:
    return f"tree{seed:03}-{number + 1}"


def _tissue(points: Points, random: np.random.Generator) -> Floats:
    """(N,) Hounsfield units of the body without its vessels."""
    x, y, z = points.T
    body = np.hypot(x / _BODY_MM[0], y / _BODY_MM[1])
    data = np.select([body > 1, body > 0.9], [_AIR, _FAT], _MUSCLE)
    # Fat around the vessels, as in a retroperitoneum.
    data[np.hypot(x / 30, (y + 2) / 14) < 1] = _FAT
    for centre, radii, value in _ORGANS:
        data[(((points - centre) / radii) ** 2).sum(axis=1) < 1] = value + random.normal(0, 10)
    spine = np.hypot(x - _SPINE_MM[0], y - _SPINE_MM[1]) < _SPINE_MM[2]
    data[spine] = np.where(np.mod(z[spine], _VERTEBRA_MM) < 0.75 * _VERTEBRA_MM, _BONE, _DISC)
    return np.asarray(data, np.float64)


def _depth(points: Points, courses: Sequence[tuple[Points, Floats]], reach_mm: float) -> tuple[Floats, Floats]:
    """(N,) largest depth below the surface of a vessel, at least -reach, and the radius of that vessel there."""
    depth, radius = np.full(len(points), -reach_mm), np.zeros(len(points))
    for course, radii in courses:
        limit = float(radii.max()) + reach_mm
        low, high = course.min(axis=0) - limit, course.max(axis=0) + limit
        near = np.flatnonzero(((points > low) & (points < high)).all(axis=1))
        distance, place = cKDTree(course).query(points[near], distance_upper_bound=limit)
        near, distance, place = (one[np.isfinite(distance)] for one in (near, distance, place))
        deeper = radii[place] - distance > depth[near]
        depth[near[deeper]] = (radii[place] - distance)[deeper]
        radius[near[deeper]] = radii[place][deeper]
    return depth, radius


def _blurred_noise(random: np.random.Generator, grid: Grid, sigma_mm: float) -> Floats:
    """(I, J, K) noise of standard deviation 1, smoothed."""
    noise = ndimage.gaussian_filter(random.standard_normal(grid.shape), sigma_mm / grid.spacing_mm)
    return np.asarray(noise / noise.std())


def _unit(vector: Floats) -> tuple[float, ...]:
    return tuple((np.asarray(vector) / np.linalg.norm(vector)).tolist())
