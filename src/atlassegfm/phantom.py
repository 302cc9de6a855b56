"""A made-up pair of abdominal scans of two patients, for the demo and for tests: no file, no network.

The anatomy is analytical. Every organ is an implicit function, a signed distance in mm that is negative
inside, in the *body frame*: axes as RAS+ (x to the patient's right, y to the front, z to the head), origin in
front of the second lumbar vertebra. A patient is a map from its world to the body frame, plus a shape
variation of each organ of its own; the scanner samples thin planes through it and averages them over the slice
thickness. Grey values are those of a fat-suppressed T1-weighted MR scan in the portal venous phase, because
its organs are bright, its fat is dark, and receive-coil shading and changes of contrast are natural in it.

What makes the pair as hard as a real one, on purpose:

- the second patient is 8 % smaller, turned by a few degrees, shifted by 2 to 4 cm and smoothly deformed;
- each organ has its own shift, turn, size and surface, so that neighbours slide along each other and no
  smooth map takes one label map exactly onto the other, although the image shows every border;
- the liver has nearly the grey value of the chest wall and fades into it, food in the stomach has that of the
  spleen, the vena cava nearly that of the aorta, and gut loops lie where they like;
- the two scans differ in spacing, orientation, field of view, contrast, shading, texture and noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .geometry import Grid
from .image import Volume
from .structures import Structure

Field = NDArray[np.float32]
Points = tuple[Field, Field, Field]

#: The labelled structures. Colours are bright ones that stay apart on a grey image.
STRUCTURES = (
    Structure(1, "liver", (240, 132, 84)),
    Structure(2, "spleen", (178, 128, 240)),
    Structure(3, "right_kidney", (76, 194, 240)),
    Structure(4, "left_kidney", (72, 222, 150)),
    Structure(5, "aorta", (255, 82, 110)),
    Structure(6, "gallbladder", (255, 214, 92)),
)
_VALUE = {structure.name: structure.value for structure in STRUCTURES}

#: Grey value of each tissue, 0 (air) to 1; for the first and for the second scan. They differ by a few
#: percent of the range, in both directions, as another time after injection and another protocol make them.
_TISSUES: dict[str, tuple[float, float]] = {
    "skin": (0.46, 0.44),
    "fat": (0.20, 0.24),
    "muscle": (0.44, 0.45),
    "cortical_bone": (0.10, 0.12),
    "marrow": (0.42, 0.46),
    "disc": (0.30, 0.33),
    "csf": (0.13, 0.16),
    "cord": (0.36, 0.38),
    "lung": (0.05, 0.06),
    "myocardium": (0.54, 0.56),
    "blood": (0.70, 0.68),
    "liver": (0.58, 0.61),
    "liver_vessel": (0.72, 0.73),
    "spleen": (0.66, 0.62),
    "kidney_cortex": (0.80, 0.78),
    "kidney_medulla": (0.60, 0.68),
    "aorta": (0.82, 0.77),
    "vena_cava": (0.74, 0.71),
    "gallbladder": (0.15, 0.20),
    "pancreas": (0.57, 0.58),
    "stomach_wall": (0.62, 0.60),
    "stomach_fluid": (0.32, 0.36),
    "stomach_food": (0.64, 0.61),
    "gas": (0.03, 0.04),
    "gut_wall": (0.60, 0.58),
    "gut_dark": (0.28, 0.34),
    "gut_bright": (0.56, 0.60),
}

#: Grey value 1 as stored, as scanners scale it.
_STORED_SCALE = 1000.0


@dataclass(frozen=True, eq=False)
class PhantomPair:
    """Two made-up scans of two made-up patients.

    Parameters
    ----------
    atlas : Volume
        The annotated scan, float32 intensities.
    atlas_labels : Volume
        Its labels, uint8, on the grid of ``atlas``.
    query : Volume
        The scan to segment, float32 intensities. Its world is another than that of ``atlas``.
    query_labels : Volume
        Its true labels, uint8, on the grid of ``query``; for scoring only.
    structures : tuple of Structure
        Names and colours of the labels.
    """

    atlas: Volume
    atlas_labels: Volume
    query: Volume
    query_labels: Volume
    structures: tuple[Structure, ...]


def make_pair(seed: int = 0) -> PhantomPair:
    """Build a pair of abdominal scans.

    Parameters
    ----------
    seed : int
        The same seed gives the same voxels; another seed gives other patients.

    Returns
    -------
    PhantomPair
        The atlas has axes LAS, 1.8 x 1.8 x 4 mm, from the iliac crests to the lung bases. The query has
        axes LPS, tilted by 8 degrees, 1.6 x 1.6 x 5 mm; it begins about 4 cm higher in the body, where it cuts
        the lower pole of the right kidney, and ends about 4 cm higher, in the heart.
    """
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
    # The body frame is the atlas patient's, but for an offset as a scanner table gives it.
    atlas_world = np.array([6.0, -14.0, 21.0])
    atlas_patient = _Patient.drawn(
        streams[0], to_body=_Placement(np.eye(3), atlas_world, _Waves.none()), tissue_column=0, strength=0.35
    )
    atlas_grid = _grid(
        shape=(190, 138, 48), spacing_mm=(1.8, 1.8, 4.0), signs=(-1, 1, 1), tilt=np.eye(3), centre_mm=atlas_world
    )

    shift = streams[1].choice([-1.0, 1.0], 3) * streams[1].uniform(20, 28, 3)
    degrees = streams[1].choice([-1.0, 1.0], 3) * streams[1].uniform((1.5, 1.5, 3), (3, 3, 5))
    scale = 0.92 * np.array([1.0, 1.03, 0.98])
    query_world = atlas_world + shift
    query_patient = _Patient.drawn(
        streams[2],
        to_body=_Placement(
            np.diag(1 / scale) @ _rotation(degrees).T,
            query_world,
            _Waves.drawn(streams[3], count=7, wavelengths_mm=(200, 360), amplitude_mm=2.8),
        ),
        tissue_column=1,
        strength=1.25,
    )
    query_grid = _grid(
        shape=(200, 156, 36),
        spacing_mm=(1.6, 1.6, 5.0),
        signs=(-1, -1, 1),
        tilt=_rotation(np.array([8.0, 2.0, 0.0])),
        centre_mm=query_world + np.array([0.0, -6.0, 39.0]),
    )
    atlas_clean, atlas_labels = _render(atlas_patient, atlas_grid, planes_per_slice=2)
    query_clean, query_labels = _render(query_patient, query_grid, planes_per_slice=3)
    atlas = _scan(atlas_clean, atlas_grid, streams[4], shading=0.10, noise=0.018)
    query = _scan(query_clean, query_grid, streams[5], shading=0.12, noise=0.024)
    return PhantomPair(
        Volume(atlas, atlas_grid),
        Volume(atlas_labels, atlas_grid),
        Volume(query, query_grid),
        Volume(query_labels, query_grid),
        STRUCTURES,
    )


# Patients


@dataclass(frozen=True, eq=False)
class _Waves:
    """A smooth random field: plane waves of random direction and phase.

    Parameters
    ----------
    wave_vectors : array, (N, 3)
        In radians per mm.
    phases : array, (N,)
        In radians.
    amplitudes : array, (N, 3)
        In mm; a scalar field uses the first column.
    """

    wave_vectors: NDArray[np.float64]
    phases: NDArray[np.float64]
    amplitudes: NDArray[np.float64]

    @classmethod
    def none(cls) -> _Waves:
        return cls(np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)))

    @classmethod
    def drawn(
        cls, rng: np.random.Generator, *, count: int, wavelengths_mm: tuple[float, float], amplitude_mm: float
    ) -> _Waves:
        """Waves whose sum has about ``amplitude_mm`` as root mean square, in each component."""
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        wavelength = rng.uniform(*wavelengths_mm, size=(count, 1))
        amplitude = rng.normal(size=(count, 3))
        amplitude *= amplitude_mm * np.sqrt(2) / np.sqrt((amplitude**2).sum(axis=0))
        return cls(2 * np.pi * direction / wavelength, rng.uniform(0, 2 * np.pi, count), amplitude)

    def vector_at(self, points: Points) -> Points:
        """The field as a displacement, x, y, z in mm."""
        total = [np.zeros_like(points[0]) for _ in range(3)]
        for wave in range(len(self.phases)):
            value = self._wave(wave, points)
            for component in range(3):
                total[component] += np.float32(self.amplitudes[wave, component]) * value
        return total[0], total[1], total[2]

    def scalar_at(self, points: Points) -> Field:
        """The field as one number, in mm."""
        total = np.zeros_like(points[0])
        for wave in range(len(self.phases)):
            total += np.float32(self.amplitudes[wave, 0]) * self._wave(wave, points)
        return total

    def _wave(self, wave: int, points: Points) -> Field:
        kx, ky, kz = self.wave_vectors[wave].astype(np.float32)
        value: Field = np.sin(kx * points[0] + ky * points[1] + kz * points[2] + np.float32(self.phases[wave]))
        return value


@dataclass(frozen=True, eq=False)
class _Placement:
    """Where a patient lies: world to body frame.

    Parameters
    ----------
    linear : array, (3, 3)
        Applied to world points about ``origin_mm``.
    origin_mm : array, (3,)
        World point that becomes the origin of the body frame, before the deformation.
    deformation : _Waves
        Added in the body frame.
    """

    linear: NDArray[np.float64]
    origin_mm: NDArray[np.float64]
    deformation: _Waves

    def body_points(self, world_mm: NDArray[np.float64]) -> Points:
        """(..., 3) RAS+ mm to x, y, z of the body frame, each (...) float32."""
        straight = (world_mm - self.origin_mm) @ self.linear.T
        points = tuple(np.ascontiguousarray(straight[..., axis], dtype=np.float32) for axis in range(3))
        moved = self.deformation.vector_at((points[0], points[1], points[2]))
        return points[0] + moved[0], points[1] + moved[1], points[2] + moved[2]


@dataclass(frozen=True, eq=False)
class _Variation:
    """How one organ of one patient differs from the textbook.

    Parameters
    ----------
    pivot_mm : array, (3,)
        About where it is turned and scaled, body frame.
    linear : array, (3, 3)
        Body frame about the pivot to the textbook's frame.
    shift_mm : array, (3,)
        Its displacement.
    surface : _Waves
        Bumps and dents, outwards in mm.
    """

    pivot_mm: NDArray[np.float64]
    linear: NDArray[np.float64]
    shift_mm: NDArray[np.float64]
    surface: _Waves

    @classmethod
    def drawn(cls, rng: np.random.Generator, freedom: _Freedom, strength: float) -> _Variation:
        """Draw one; strength 1 is the difference between two patients, of a few mm, degrees and percent."""
        much = strength * freedom.share
        shift = rng.choice([-1.0, 1.0], 3) * rng.uniform(2.0, 5.0, 3) * much
        turn = rng.choice([-1.0, 1.0], 3) * rng.uniform(3, 8, 3) * much
        size = np.exp(rng.choice([-1.0, 1.0], 3) * rng.uniform(0.03, 0.09, 3) * much)
        wavelengths_mm = (freedom.bump_size_mm, 2 * freedom.bump_size_mm)
        surface = _Waves.drawn(rng, count=6, wavelengths_mm=wavelengths_mm, amplitude_mm=freedom.bumps_mm * strength)
        pivot = np.array(freedom.pivot_mm)
        return cls(pivot, np.diag(1 / size) @ _rotation(turn).T, shift, surface)

    def textbook_points(self, points: Points) -> Points:
        """Body frame to the frame in which the organ has its textbook shape."""
        offset = self.pivot_mm + self.shift_mm
        x, y, z = (axis - np.float32(o) for axis, o in zip(points, offset, strict=True))
        m = self.linear.astype(np.float32)
        p = self.pivot_mm.astype(np.float32)
        return (
            m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + p[0],
            m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + p[1],
            m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + p[2],
        )


@dataclass(frozen=True, eq=False)
class _GutLoop:
    """A piece of bent gut: a torus, wall and content."""

    centre_mm: NDArray[np.float64]
    frame: NDArray[np.float64]
    bend_mm: float
    radius_mm: float
    content: str


@dataclass(frozen=True)
class _Freedom:
    """How much an organ may differ between patients.

    Parameters
    ----------
    pivot_mm : tuple of float, (3,)
        About its middle, body frame.
    bumps_mm, bump_size_mm : float
        Height and length of its bumps.
    share : float
        Factor on shift, turn and growth; below 1 for thin vessels, which would lose their overlap altogether.
    """

    pivot_mm: tuple[float, float, float]
    bumps_mm: float
    bump_size_mm: float
    share: float = 1.0


_VARIED = {
    "liver": _Freedom((62, 5, 28), 3.6, 55),
    "spleen": _Freedom((-98, -32, 40), 3.0, 42),
    "right_kidney": _Freedom((64, -38, -14), 2.0, 34),
    "left_kidney": _Freedom((-64, -38, 4), 2.0, 34),
    "aorta": _Freedom((-9, -22, 0), 1.0, 60, 0.6),
    "vena_cava": _Freedom((17, -18, 0), 1.5, 50, 0.6),
    "gallbladder": _Freedom((52, 46, -12), 1.8, 28),
    "pancreas": _Freedom((-20, 8, 18), 2.0, 40),
    "stomach": _Freedom((-58, 34, 42), 4.0, 60),
    "psoas": _Freedom((0, -46, -40), 2.0, 60),
}


@dataclass(frozen=True, eq=False)
class _Patient:
    """One made-up body.

    Parameters
    ----------
    to_body : _Placement
        World to body frame.
    tissue_column : int
        Which grey values of :data:`_TISSUES`.
    fat_mm : float
        Thickness of the fat under the skin at the flank.
    skin_surface : _Waves
        Unevenness of the body's outline, mm.
    variations : dict of str to _Variation
        One for each name of :data:`_VARIED`.
    gut : tuple of _GutLoop
        Where the gut happens to lie.
    """

    to_body: _Placement
    tissue_column: int
    fat_mm: float
    skin_surface: _Waves
    variations: dict[str, _Variation] = field(default_factory=dict)
    gut: tuple[_GutLoop, ...] = ()

    @classmethod
    def drawn(cls, rng: np.random.Generator, *, to_body: _Placement, tissue_column: int, strength: float) -> _Patient:
        """Draw a patient whose organs differ from the textbook by ``strength`` (0 not, 1 a good deal)."""
        variations = {name: _Variation.drawn(rng, freedom, strength) for name, freedom in _VARIED.items()}
        gut = []
        for _ in range(46):
            centre = rng.uniform((-88, 0, -125), (84, 76, 4))
            turn = _rotation(rng.uniform(0, 180, 3))
            content = str(rng.choice(["gut_dark", "gut_bright", "gas"], p=[0.5, 0.42, 0.08]))
            gut.append(_GutLoop(centre, turn, float(rng.uniform(13, 26)), float(rng.uniform(8, 11.5)), content))
        return cls(
            to_body,
            tissue_column,
            fat_mm=float(rng.uniform(15, 18) if tissue_column == 0 else rng.uniform(20, 24)),
            skin_surface=_Waves.drawn(rng, count=4, wavelengths_mm=(140, 260), amplitude_mm=1.2),
            variations=variations,
            gut=tuple(gut),
        )


# Shapes: signed distances in mm, negative inside


def _ellipsoid(points: Points, centre: ArrayLike, radii: ArrayLike, frame: NDArray[np.float64] | None = None) -> Field:
    """First-order distance from an ellipsoid: exact on its surface, which is where edges are drawn."""
    c = np.asarray(centre, dtype=np.float32)
    r = np.asarray(radii, dtype=np.float32)
    x, y, z = points[0] - c[0], points[1] - c[1], points[2] - c[2]
    if frame is not None:
        m = frame.T.astype(np.float32)  # columns of ``frame`` are the ellipsoid's own axes
        x, y, z = (m[row, 0] * x + m[row, 1] * y + m[row, 2] * z for row in range(3))
    x, y, z = x / r[0], y / r[1], z / r[2]
    level = np.sqrt(x * x + y * y + z * z)
    x, y, z = x / r[0], y / r[1], z / r[2]
    slope = np.sqrt(x * x + y * y + z * z) + np.float32(1e-6)
    distance: Field = level * (level - 1) / slope
    return distance


def _tube(points: Points, path: ArrayLike, radii: ArrayLike) -> Field:
    """Distance from a chain of round cones through (N, 3) ``path`` with (N,) ``radii``."""
    nodes = np.asarray(path, dtype=np.float32)
    widths = np.asarray(radii, dtype=np.float32)
    best: Field | None = None
    for start, stop, first, last in zip(nodes[:-1], nodes[1:], widths[:-1], widths[1:], strict=True):
        axis = stop - start
        x, y, z = points[0] - start[0], points[1] - start[1], points[2] - start[2]
        along = np.clip((x * axis[0] + y * axis[1] + z * axis[2]) / (axis @ axis), 0, 1)
        x, y, z = x - along * axis[0], y - along * axis[1], z - along * axis[2]
        piece = np.sqrt(x * x + y * y + z * z) - (first + along * (last - first))
        best = piece if best is None else _blend_union(best, piece, 4.0)
    if best is None:
        raise ValueError("a tube needs two nodes")
    return best


def _torus(points: Points, loop: _GutLoop) -> Field:
    c = loop.centre_mm.astype(np.float32)
    m = loop.frame.T.astype(np.float32)
    x, y, z = points[0] - c[0], points[1] - c[1], points[2] - c[2]
    u, v, w = (m[row, 0] * x + m[row, 1] * y + m[row, 2] * z for row in range(3))
    ring = np.sqrt(u * u + v * v) - np.float32(loop.bend_mm)
    folds = np.float32(1.2) * np.sin(9 * np.arctan2(v, u))
    distance: Field = np.sqrt(ring * ring + w * w) - np.float32(loop.radius_mm) + folds
    return distance


def _blend_union(a: Field, b: Field, width_mm: float) -> Field:
    """Union whose groove is rounded over ``width_mm``."""
    h = np.maximum(width_mm - np.abs(a - b), 0) / np.float32(width_mm)
    result: Field = np.minimum(a, b) - h * h * np.float32(width_mm / 4)
    return result


def _blend_intersection(a: Field, b: Field, width_mm: float) -> Field:
    """Intersection whose edge is rounded over ``width_mm``."""
    return -_blend_union(-a, -b, width_mm)


def _outline(x: Field, y: Field, half_width: Field | float, half_depth: float, centre_y: float, power: float) -> Field:
    """Radial distance from an upright cylinder with a superellipse as section."""
    v = y - np.float32(centre_y)
    level = (np.abs(x / half_width) ** power + np.abs(v / np.float32(half_depth)) ** power) ** (1 / power)
    distance: Field = np.sqrt(x * x + v * v) * (1 - 1 / np.maximum(level, np.float32(0.05)))
    return distance


def _bump(x: Field, centre: float, width: float) -> Field:
    scaled = (x - np.float32(centre)) / np.float32(width)
    value: Field = np.exp(-scaled * scaled)
    return value


def _rotation(degrees: ArrayLike) -> NDArray[np.float64]:
    """(3, 3): turn about x, then y, then z, by (3,) degrees."""
    a, b, c = np.deg2rad(np.asarray(degrees, dtype=np.float64))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    turn: NDArray[np.float64] = about_z @ about_y @ about_x
    return turn


# Painting


@dataclass(eq=False)
class _Plane:
    """A thin plane through a patient that organs are painted onto, the later over the earlier.

    Parameters
    ----------
    points : tuple of array, (I, J) float32 each
        x, y, z in the body frame.
    edge_mm : float
        Width over which a sharp border fades: the in-plane size of a voxel, for partial volume.
    grey : array, (I, J) float32
        Painted so far.
    labels : array, (I, J) uint8
        Painted so far.
    """

    points: Points
    edge_mm: float
    grey: Field = field(init=False)
    labels: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        x, y, z = self.points
        self.grey = np.zeros_like(x)
        self.labels = np.zeros(x.shape, np.uint8)
        # The plane is nearly axis-aligned in the body, so that rows and columns bound an organ's box.
        self._rows = (x.min(axis=1), x.max(axis=1))
        self._columns = (y.min(axis=0), y.max(axis=0))
        self._heights = (float(z.min()), float(z.max()))

    def cut(self, box: tuple[tuple[float, float], ...]) -> tuple[slice, slice] | None:
        """The part of the plane that may lie in a box of the body frame, or None."""
        if self._heights[1] < box[2][0] or self._heights[0] > box[2][1]:
            return None
        rows = np.flatnonzero((self._rows[1] >= box[0][0]) & (self._rows[0] <= box[0][1]))
        columns = np.flatnonzero((self._columns[1] >= box[1][0]) & (self._columns[0] <= box[1][1]))
        if not len(rows) or not len(columns):
            return None
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def within(self, part: tuple[slice, slice]) -> Points:
        """The points of a part of the plane."""
        return self.points[0][part], self.points[1][part], self.points[2][part]

    def paint(
        self,
        distance: Field,
        grey: float | Field,
        part: tuple[slice, slice] = (slice(None), slice(None)),
        *,
        value: int | None = 0,
        fade_mm: float = 0.0,
    ) -> None:
        """Paint where ``distance`` is negative; ``value`` None leaves the labels as they are."""
        cover = np.clip(0.5 - distance / np.float32(max(self.edge_mm, fade_mm)), 0, 1)
        view = self.grey[part]
        view += cover * (grey - view)
        if value is not None:
            self.labels[part][distance < 0] = value


_Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


class _Painter:
    """Paints one patient onto one plane."""

    def __init__(self, patient: _Patient, plane: _Plane) -> None:
        self._patient = patient
        self._plane = plane
        self._grey = {name: values[patient.tissue_column] for name, values in _TISSUES.items()}
        x, y, z = plane.points
        waist = 6 * _bump(z, 95, 70) - 7 * _bump(z, -30, 55) + 5 * _bump(z, -130, 55)
        self._skin = _outline(x, y, 156 + waist, 103, -6, 2.35) + patient.skin_surface.scalar_at(plane.points)
        self._skin += 5 * _bump(x, 0, 16) * _bump(y, -112, 20)  # the furrow along the back
        self._skin -= 3 * _bump(x, 0, 60) * _bump(y, 100, 30)
        angle_fat = 1 - 0.45 * _bump(y, 96, 34) + 0.25 * _bump(y, -60, 40) - 0.35 * _bump(z, 110, 55)
        self._muscle = self._skin + np.float32(patient.fat_mm) * angle_fat
        wall = 11 + 3 * _bump(x, 0, 70) * _bump(y, 90, 40)
        self._cavity = np.maximum(self._muscle + wall, _outline(x, y, 132 + 0.6 * waist, 81, 6, 2.5))
        edge = np.clip(1 + self._cavity / 75, 0, 1.2)
        # The diaphragm: two domes, the right one higher, falling off to the ribs all round.
        dome = 62 + 30 * _bump(x, 66, 62) + 20 * _bump(x, -72, 55) + 6 * _bump(y, 15, 60)
        self._above_diaphragm = z - (dome - 62 * edge**4)

    def paint(self) -> None:
        """Paint everything, in the order in which the later covers the earlier."""
        self._wall()
        self._thorax()
        self._gut()
        self._stomach()
        self._pancreas()
        self._liver()
        self._spleen()
        self._kidney("right_kidney", (64, -38, -14), 1)
        self._kidney("left_kidney", (-64, -38, 4), -1)
        self._spine()
        self._vessels()

    def _local(self, organ: str, box: _Box) -> tuple[tuple[slice, slice], Points, Field] | None:
        """The part of the plane near an organ, its textbook points, and its bumps in mm."""
        part = self._plane.cut(box)
        if part is None:
            return None
        variation = self._patient.variations[organ]
        points = variation.textbook_points(self._plane.within(part))
        return part, points, variation.surface.scalar_at(points)

    def _wall(self) -> None:
        x, y, z = self._plane.points
        grey, plane = self._grey, self._plane
        plane.paint(self._skin, grey["skin"])
        # Strands of connective tissue keep the fat from looking like plastic.
        strands = np.sin(x / 7 + 2 * np.sin(y / 11)) * np.sin(y / 9 + 2 * np.sin(z / 13 + x / 19))
        plane.paint(self._skin + 2.4, grey["fat"] + np.float32(0.025) * strands)
        fibres = np.sin(self._muscle / 2.1 + 1.5 * np.sin(x / 23 + y / 31))
        plane.paint(self._muscle, grey["muscle"] + np.float32(0.018) * fibres)
        # Fat between the layers of the flank and along the linea alba.
        layer = np.abs(self._muscle + 5.2 + 1.5 * np.sin(y / 17)) - 0.5
        plane.paint(np.maximum(layer, np.abs(y + 5) - 62), 0.5 * (grey["fat"] + grey["muscle"]))
        plane.paint(self._cavity, grey["fat"] + np.float32(0.02) * strands)
        linea = np.maximum(np.abs(x) - 1.2, np.maximum(60 - y, self._muscle + 1))
        plane.paint(linea, grey["fat"])
        self._ribs()
        part = plane.cut(((-150, 150), (-95, 60), (-200, -58)))
        if part is not None:
            points = plane.within(part)
            for side in (-1, 1):
                shell = _ellipsoid(points, (side * 62, -18, -150), (66, 62, 80), _rotation((0, side * 12, 0)))
                behind = np.maximum(52 - side * points[0] + 0.4 * (points[1] + 40), points[1] - 42)
                crest: Field = np.maximum(np.abs(shell) - 5.5, behind)
                plane.paint(crest, grey["cortical_bone"], part)
                plane.paint(crest + 2.6, grey["marrow"], part)

    def _ribs(self) -> None:
        plane, grey = self._plane, self._grey
        part = plane.cut(((-170, 170), (-110, 95), (-35, 260)))
        if part is None:
            return
        x, y, z = plane.within(part)
        # A rib falls by 0.55 mm per mm on its way round from the spine: height along it, modulo their distance.
        forward = np.clip(y + 78, 0, None)
        height = z + 0.62 * forward - 40
        across = (height + 13) % 27 - 13.5
        depth = self._cavity[part] - 4.5
        rib = np.sqrt((across / 1.25) ** 2 + (depth * 1.35) ** 2) - 5.2
        # The lowest ribs are short, and in front is cartilage only.
        ending = np.maximum(-height - 12, y - np.clip(20 + 0.6 * z, -60, 62))
        rib = np.maximum(rib, np.maximum(ending, 26 - np.abs(x)))
        plane.paint(rib, grey["cortical_bone"], part)
        plane.paint(rib + 2.2, grey["marrow"], part)

    def _thorax(self) -> None:
        x, y, z = self._plane.points
        grey, plane = self._grey, self._plane
        inside = np.maximum(self._cavity + 1.5, -self._above_diaphragm)
        if float(inside.min()) > plane.edge_mm:
            return
        plane.paint(np.maximum(self._cavity, -self._above_diaphragm - 3), grey["muscle"])
        frame = _rotation((0, 10, 25))
        points = (x, y, z)
        heart = _ellipsoid(points, (-24, 34, 122), (62, 46, 40), frame)
        mediastinum = _blend_union(_outline(x - np.float32(3), y, 25, 34, -30, 2), np.abs(x + 4) - 0.12 * (y + 20), 20)
        mediastinum = _blend_union(mediastinum, heart - 4, 14)
        wander_x, wander_y = x + 9 * np.sin(y / 17 + z / 29), y + 9 * np.sin(x / 19 - z / 23)
        vessels = np.sin(wander_x / 6.3) * np.sin(wander_y / 5.7) * np.sin(z / 11.0 + x / 14.0 + y / 31.0)
        vessels = np.float32(0.9) * np.clip(vessels - 0.5, 0, 1)
        lung = np.maximum(inside, -mediastinum)
        plane.paint(lung, grey["lung"] + vessels)
        plane.paint(np.maximum(inside, np.maximum(mediastinum + 2, -self._above_diaphragm + 3)), grey["fat"])
        heart = np.maximum(np.maximum(heart, -self._above_diaphragm + 2), self._cavity + 4)
        plane.paint(heart - 2.5, grey["fat"])
        plane.paint(heart, grey["myocardium"])
        plane.paint(_ellipsoid(points, (-42, 26, 124), (30, 23, 22), frame), grey["blood"])
        plane.paint(_ellipsoid(points, (8, 44, 122), (28, 20, 21), frame), grey["blood"])
        plane.paint(_tube(points, [(-8, -8, 90), (-4, -10, 160)], (7, 7)), grey["stomach_wall"])

    def _gut(self) -> None:
        grey, plane = self._grey, self._plane
        for loop in self._patient.gut:
            reach = loop.bend_mm + loop.radius_mm + 4
            c = loop.centre_mm
            part = plane.cut(tuple((float(v - reach), float(v + reach)) for v in c))
            if part is None:
                continue
            distance = np.maximum(_torus(plane.within(part), loop), self._cavity[part] + 2)
            plane.paint(distance, grey["gut_wall"], part)
            plane.paint(distance + 2.6, grey[loop.content], part)
        colon = [
            (92, 2, -150), (96, 4, -90), (94, 10, -52), (78, 48, -42), (34, 66, -52), (-20, 70, -56),
            (-64, 60, -34), (-100, 20, -2), (-106, -4, -14), (-108, -12, -70), (-100, -14, -150),
        ]  # fmt: skip
        part = plane.cut(((-135, 125), (-45, 95), (-180, 30)))
        if part is None:
            return
        points = plane.within(part)
        x, y, z = points
        folds = 2.4 * np.sin(z / 5.2 + x / 6.0)
        distance = _tube(points, colon, (21, 21, 19, 18, 16, 16, 16, 15, 14, 13, 13)) + folds
        distance = np.maximum(distance, self._cavity[part] + 2)
        content = np.where(np.sin(x / 21 + z / 33) > 0.1, np.float32(grey["gut_dark"]), np.float32(grey["gut_bright"]))
        plane.paint(distance, grey["gut_wall"], part)
        plane.paint(distance + 2.4, content, part)
        # Gas collects in front.
        plane.paint(np.maximum(distance + 2.4, 58 + 0.15 * x - y), grey["gas"], part)

    def _stomach(self) -> None:
        local = self._local("stomach", ((-130, 40), (-45, 100), (-30, 105)))
        if local is None:
            return
        part, points, bumps = local
        grey, plane = self._grey, self._plane
        fundus = _ellipsoid(points, (-64, 14, 52), (38, 42, 40), _rotation((10, 0, 20)))
        antrum = _tube(points, [(-58, 40, 26), (-36, 58, 4), (-4, 52, 0), (20, 38, 4)], (27, 22, 16, 11))
        distance = _blend_union(fundus, antrum, 16) - bumps
        distance = np.maximum(distance, np.maximum(self._cavity[part], self._above_diaphragm[part]) + 3)
        plane.paint(distance, grey["stomach_wall"], part)
        inside = distance + 4.2
        plane.paint(inside, grey["stomach_fluid"], part)
        # Food lies at the back, next to the spleen and with its grey value; gas is in front.
        plane.paint(np.maximum(inside, points[1] - 16 - 0.12 * points[0]), grey["stomach_food"], part, fade_mm=6)
        plane.paint(np.maximum(inside, 62 - points[1]), grey["gas"], part)

    def _pancreas(self) -> None:
        local = self._local("pancreas", ((-110, 60), (-45, 60), (-35, 70)))
        if local is None:
            return
        part, points, bumps = local
        path = [(34, 12, -12), (28, 16, 6), (4, 16, 14), (-28, 6, 22), (-58, -12, 32), (-80, -24, 38)]
        lobules = 1.2 * np.sin(points[0] / 2.9) * np.sin(points[2] / 3.3 + points[1] / 3.1)
        self._plane.paint(
            _tube(points, path, (14, 13, 9, 9, 9, 7)) - bumps + lobules, self._grey["pancreas"], part, fade_mm=2.5
        )

    def _liver(self) -> None:
        local = self._local("liver", ((-110, 150), (-90, 105), (-90, 115)))
        if local is None:
            return
        part, points, bumps = local
        x, y, z = points
        grey, plane = self._grey, self._plane
        right = _ellipsoid(points, (78, -2, 24), (70, 84, 84), _rotation((0, 8, 0)))
        # The visceral surface: hollow, facing the left, the back and the feet.
        visceral = 0.52 * (34 - x) - 0.42 * (y - 6) - 0.74 * (z - 6) + 10 * _bump(x, 60, 40) * _bump(y, -30, 40)
        right = _blend_intersection(right, visceral - 16, 18)
        left = _ellipsoid(points, (0, 42, 50), (78, 44, 27), _rotation((-12, 10, -6)))
        distance = _blend_union(right, left, 22) - bumps
        # The fissure between the lobes opens to the front and below.
        fissure = _ellipsoid(points, (14, 66, 22), (4.5, 34, 30), _rotation((0, 0, 12)))
        distance = _blend_intersection(distance, -fissure, 6)
        hilum = _ellipsoid(points, (26, 8, 16), (20, 16, 14))
        distance = _blend_intersection(distance, -hilum, 10)
        wall = np.maximum(self._cavity[part] + 0.5, self._above_diaphragm[part] + 1.5)
        distance = _blend_intersection(distance, wall, 5)
        mottle = 0.012 * np.sin(x / 5.1 + np.sin(y / 7)) * np.sin(y / 6.3 + z / 4.7)
        # Its border fades: breathing blurs it, and the chest wall has nearly its grey value.
        plane.paint(distance, grey["liver"] + mottle.astype(np.float32), part, value=_VALUE["liver"], fade_mm=4.5)
        for path, radii in _LIVER_VESSELS:
            vessel = np.maximum(_tube(points, path, radii), distance + 3)
            plane.paint(vessel, grey["liver_vessel"], part, value=None, fade_mm=2.5)
        local = self._local("gallbladder", ((15, 100), (5, 95), (-70, 40)))
        if local is None:
            return
        part, points, bumps = local
        bladder = _blend_union(
            _ellipsoid(points, (53, 50, -16), (14, 15, 25), _rotation((25, -12, 0))),
            _tube(points, [(50, 38, 4), (36, 22, 12)], (6.5, 2.5)),
            8,
        )
        bladder = np.maximum(bladder - bumps, self._cavity[part] + 2)
        plane.paint(bladder - 1.4, grey["gut_wall"], part, value=None)
        layers: Field = np.clip(np.float32(0.076) - np.float32(0.002) * points[1], -0.018, 0.06)  # thick bile sinks
        plane.paint(bladder, grey["gallbladder"] + layers, part, value=_VALUE["gallbladder"])

    def _spleen(self) -> None:
        local = self._local("spleen", ((-150, -45), (-95, 40), (-20, 105)))
        if local is None:
            return
        part, points, bumps = local
        body = _ellipsoid(points, (-102, -30, 40), (34, 55, 47), _rotation((12, 14, 24)))
        hollow = _ellipsoid(points, (-58, -2, 40), (35, 40, 60))
        distance = _blend_intersection(body, -hollow, 9) - bumps
        wall = np.maximum(self._cavity[part] + 1, self._above_diaphragm[part] + 1.5)
        distance = _blend_intersection(distance, wall, 5)
        self._plane.paint(distance, self._grey["spleen"], part, value=_VALUE["spleen"], fade_mm=2.5)

    def _kidney(self, name: str, centre: tuple[float, float, float], side: int) -> None:
        box = tuple((c - reach, c + reach) for c, reach in zip(centre, (56, 56, 82), strict=True))
        local = self._local(name, (box[0], box[1], box[2]))
        if local is None:
            return
        part, points, bumps = local
        grey, plane = self._grey, self._plane
        frame = _rotation((-10, side * 14, side * -24))
        c = np.asarray(centre, dtype=np.float64)
        bean = _ellipsoid(points, c, (26, 26, 54), frame)
        medial = frame @ np.array([-side * 1.0, 0.15, 0.0])
        # The sinus is the fat the bean is bent around.
        sinus = _ellipsoid(points, c + 24 * medial, (17, 9, 20), frame)
        distance = _blend_intersection(bean - bumps, -sinus, 6)
        # It lies on the muscles of the back and does not reach through them.
        back = np.maximum(-66 - self._plane.within(part)[1], self._cavity[part] + 1)
        distance = _blend_intersection(distance, back, 14)
        plane.paint(np.maximum(distance - 2.5, self._cavity[part]), grey["fat"], part)  # its capsule of fat
        plane.paint(distance, grey["kidney_cortex"], part, value=_VALUE[name])
        along = (points[2] - np.float32(centre[2])) / 6.2
        around = np.arctan2(points[1] - np.float32(c[1]), points[0] - np.float32(c[0]))
        columns = 3.0 * np.sin(along) + 2.2 * np.sin(4 * around)
        medulla = np.maximum(distance + 9.5 + columns, -sinus + 4)
        plane.paint(medulla, grey["kidney_medulla"], part, value=None, fade_mm=3.5)
        pelvis = _tube(points, [c + 14 * medial, c + 34 * medial, c + 42 * medial + np.array([0, 4, -30])], (6, 4, 2.5))
        plane.paint(np.maximum(pelvis, -distance), grey["stomach_fluid"], part, value=None)
        artery = _tube(points, [c + 16 * medial, (-side * -12, -26, centre[2] + 6)], (2.6, 3.4))
        plane.paint(np.maximum(artery, -distance), grey["vena_cava"], part, value=None)

    def _spine(self) -> None:
        plane, grey = self._plane, self._grey
        part = plane.cut(((-95, 95), (-118, 0), (-1000, 1000)))
        if part is None:
            return
        points = plane.within(part)
        x, y, z = points
        inside = self._muscle[part] + 2
        lordosis = 5 * np.sin((z + 20) / 60)
        y = y - lordosis
        for side in (-1, 1):
            erector = _outline(x - np.float32(side * 33), y, 31, 20, -86, 2.4)
            erector = np.maximum(erector, np.maximum(inside, 4 - side * x))
            plane.paint(erector, grey["muscle"] + 0.03 * np.sin(x / 3.3) * np.sin(y / 2.7), part)
            plane.paint(np.maximum(_outline(x - np.float32(side * 68), y, 22, 9, -68, 2), z - 30), grey["muscle"], part)
        local = self._local("psoas", ((-95, 95), (-90, 0), (-1000, 40)))
        if local is not None:
            psoas_part, psoas_points, bumps = local
            down = np.clip((36 - psoas_points[2]) / 110, 0, 1)
            for side in (-1, 1):
                px = psoas_points[0] - side * (26 + 14 * down)
                psoas = np.sqrt((px / (0.5 + 0.75 * down)) ** 2 + ((psoas_points[1] + 48) / (0.6 + 0.8 * down)) ** 2)
                distance = np.maximum((psoas - 18) * (0.4 + 0.8 * down) - bumps, psoas_points[2] - 34)
                plane.paint(distance, grey["muscle"], psoas_part)
        phase = (z + 0.12 * y + 6) % 36 - 18  # vertebra and disc take turns, 36 mm apart
        waist = 2.2 * _bump(phase, 0, 8)
        body = _ellipsoid((x, y, np.zeros_like(z)), (0, -52, 0), (23, 17, 50)) + waist
        disc = np.abs(phase) - 13.5
        process = np.maximum(
            np.maximum(np.abs(x) - 3.4, np.abs(phase + 4) - 10), np.maximum(y + 88, np.maximum(-108 - y, inside))
        )
        wings = _tube((np.abs(x), y, phase), [(10, -72, 0), (28, -76, 3), (42, -78, 5)], (7, 5, 3.5))
        arch = np.maximum(np.abs(_outline(x, y, 14.5, 12.5, -80, 1.6)) - 3.6, np.abs(phase + 2) - 10)
        pedicle = _tube((np.abs(x), y, phase), [(12, -56, 3), (14, -76, 2)], (5, 5))
        bone = _blend_union(_blend_union(process, wings, 6), _blend_union(arch, pedicle, 5), 6)
        plane.paint(bone, grey["cortical_bone"], part)
        plane.paint(bone + 1.6, grey["marrow"], part)
        plane.paint(body, grey["cortical_bone"], part)
        basivertebral = 0.08 * _bump(phase, 0, 3) * _bump(y, -62, 9)
        plane.paint(np.maximum(body + 1.8, disc + 1.2), grey["marrow"] + basivertebral, part)
        plane.paint(np.maximum(body + 0.8, -disc + 1.0), grey["disc"], part)
        canal = _outline(x, y, 11, 9, -79, 2)
        plane.paint(canal, grey["csf"], part)
        cord = _ellipsoid((x, y, np.zeros_like(z)), (0, -79, 0), (5.2, 4.4, 50))
        plane.paint(np.maximum(cord, -z - 5), grey["cord"], part)
        for side in (-1, 1):  # roots of the cauda equina
            for root_x, root_y in ((2, -82), (5, -80), (3.5, -84)):
                root = np.sqrt((x - side * root_x) ** 2 + (y - root_y) ** 2) - 1.0
                plane.paint(np.maximum(root, z + 5), grey["cord"], part)

    def _vessels(self) -> None:
        plane, grey = self._plane, self._grey
        local = self._local("vena_cava", ((-40, 60), (-60, 30), (-1000, 1000)))
        if local is not None:
            part, points, bumps = local
            flat = (points[0], points[1] * 1.18, points[2])
            path = [(15, -21, -140), (17, -22, -60), (18, -20, 10), (20, -10, 60), (18, 2, 96), (12, 12, 125)]
            plane.paint(_tube(flat, path, (11, 11, 11.5, 12, 12.5, 14)) - bumps, grey["vena_cava"], part)
        local = self._local("aorta", ((-60, 40), (-75, 30), (-1000, 1000)))
        if local is None:
            return
        part, points, bumps = local
        z = points[2]
        path = [(-10, -20, -84), (-11, -19, -40), (-9, -20, 10), (-7, -25, 60), (-12, -30, 110), (-16, -34, 190)]
        distance = _tube(points, path, (8.5, 9, 9.8, 10.8, 11.5, 12)) - bumps
        for side in (-1, 1):
            iliac = _tube(points, [(-10, -20, -80), (-10 + side * 26, -22, -140)], (6.5, 6))
            plane.paint(iliac, grey["aorta"], part)
        plane.paint(distance - 1.2, grey["muscle"], part, value=None)
        for side in (-1, 1):  # the crura of the diaphragm hug it
            crus = _tube(
                points, [(-8 + side * 17, -36, -30), (-8 + side * 16, -28, 30), (-8 + side * 15, -26, 84)], [2, 5, 5]
            )
            plane.paint(np.maximum(crus, 1.5 - distance), grey["muscle"], part, fade_mm=2.5)
        # Named from the hiatus of the diaphragm to the fork; beyond, the same vessel has no label.
        plane.paint(distance, grey["aorta"], part)
        plane.paint(np.maximum(distance, np.maximum(z - 82, -84 - z)), grey["aorta"], part, value=_VALUE["aorta"])
        for trunk, radius in (
            ([(-8, -16, 44), (-6, 2, 44), (22, 4, 34)], 3.2),
            ([(-9, -16, 26), (-9, 0, 12), (-8, 8, -40)], 3.0),
        ):
            plane.paint(np.maximum(_tube(points, trunk, [radius] * 3), -distance), grey["aorta"], part, value=None)


#: Portal and hepatic veins: nodes in the body frame, mm, and radii, mm.
_LIVER_VESSELS: tuple[tuple[list[tuple[float, float, float]], list[float]], ...] = (
    ([(24, 10, 14), (44, 6, 26), (70, -4, 30), (104, -16, 26)], [6, 5.5, 4.5, 2]),
    ([(70, -4, 30), (86, 26, 20), (100, 44, 12)], [4, 3, 1.5]),
    ([(70, -4, 30), (76, -26, 6), (84, -34, -22)], [3.5, 2.8, 1.5]),
    ([(44, 6, 26), (18, 30, 44), (-10, 44, 52), (-42, 50, 54)], [4.5, 4, 3, 1.5]),
    ([(19, -4, 80), (48, -8, 66), (84, -12, 50), (116, -14, 44)], [5, 4.5, 3.5, 1.5]),
    ([(19, -2, 80), (40, 24, 60), (58, 50, 34)], [4.5, 3.8, 1.8]),
    ([(17, 2, 80), (2, 26, 68), (-18, 44, 60)], [4, 3.2, 1.5]),
)


# Scanning


def _grid(
    *,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    signs: tuple[int, int, int],
    tilt: NDArray[np.float64],
    centre_mm: NDArray[np.float64],
) -> Grid:
    """A grid about a centre; ``signs`` +1 or -1 along x, y, z before the tilt."""
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag(np.array(signs) * np.array(spacing_mm))
    affine[:3, 3] = centre_mm - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def _render(patient: _Patient, grid: Grid, *, planes_per_slice: int) -> tuple[Field, NDArray[np.uint8]]:
    """Noise-free grey values (0 to 1) and labels of a patient on a grid.

    A slice is the mean of ``planes_per_slice`` planes spread over its thickness: partial volume as a scanner
    has it. A voxel gets the label that most of them show, background on a tie.
    """
    grey = np.zeros(grid.shape, np.float32)
    labels = np.zeros(grid.shape, np.uint8)
    ij = np.moveaxis(np.indices(grid.shape[:2]), 0, -1).astype(np.float64)
    edge_mm = float(grid.spacing_mm[:2].mean())
    offsets = (np.arange(planes_per_slice) + 0.5) / planes_per_slice - 0.5
    for k in range(grid.shape[2]):
        votes = np.zeros((len(STRUCTURES) + 1, *grid.shape[:2]), np.uint8)
        for offset in offsets:
            world = grid.voxel_to_world(np.concatenate([ij, np.full((*ij.shape[:2], 1), k + offset)], axis=-1))
            plane = _Plane(patient.to_body.body_points(world), edge_mm)
            _Painter(patient, plane).paint()
            grey[:, :, k] += plane.grey / planes_per_slice
            for value in np.unique(plane.labels):
                votes[value] += plane.labels == value
        labels[:, :, k] = votes.argmax(axis=0)
    return grey, labels


def _scan(clean: Field, grid: Grid, rng: np.random.Generator, *, shading: float, noise: float) -> Field:
    """What the scanner makes of the noise-free image: texture, coil shading, noise, stored range.

    Parameters
    ----------
    clean : array, (I, J, K)
        0 to 1.
    grid : Grid
        Its grid.
    rng : Generator
        For this scan alone.
    shading : float
        Standard deviation of the coil shading's factor.
    noise : float
        Standard deviation of the noise, grey values of ``clean``.
    """
    shape = clean.shape
    texture = np.zeros(shape, np.float32)
    for size_mm, height in ((3.0, 0.022), (9.0, 0.022)):
        white = rng.standard_normal(shape, dtype=np.float32)
        smooth = ndimage.gaussian_filter(white, size_mm / grid.spacing_mm, truncate=2.5)
        texture += np.float32(height) * smooth / smooth.std()
    axes = [np.linspace(-1, 1, n) for n in shape]
    coil = np.polynomial.legendre.leggrid3d(axes[0], axes[1], axes[2], rng.standard_normal((4, 4, 3)))
    coil = np.exp(shading * (coil - coil.mean()) / coil.std()).astype(np.float32)
    signal = clean * (1 + texture) * coil
    # A magnitude image: noise in two channels, so that air is not zero.
    blur = (0.45, 0.45, 0)
    real, imaginary = (
        np.float32(noise * 1.3)
        * ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), blur, truncate=3)
        for _ in range(2)
    )
    magnitude = np.hypot(signal + real, imaginary)
    stored: Field = np.round(np.float32(_STORED_SCALE) * magnitude).astype(np.float32)
    return stored
