"""Images that look like stained blood smears, drawn from a seed, with the boxes of their cells.

They stand in wherever an image is needed and no data set is at hand: the page's sample, tests,
benchmarks. Everything is light through stain: each cell adds absorbance to a field, so cells that
overlap darken each other as real ones do, and light = background * exp(-absorbance). The constants
are medians and quartiles measured over Giemsa-stained smears at 640 x 480 pixels.
"""

from __future__ import annotations

import io
import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RED: Final = "RBC"
WHITE: Final = "WBC"
PLATELET: Final = "Platelets"

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels, inside the image."""

_Field = NDArray[np.float32]

SAMPLE_SEED: Final = 56
"""Chosen by eye: every kind of cell, whole, cut and overlapping, and none hidden."""

_AREA: Final = 640 * 480
"""The field of view that sizes are given for; other images see the same field, larger."""
_BACKGROUND: Final = np.array([194.0, 196.5, 190.5], dtype=np.float32)

# Absorbance of each stain for red, green, blue light: -ln(colour / background). Nuclei are bluer
# than the background itself, hence the negative values.
_HAEMOGLOBIN: Final = np.array([0.070, 0.206, 0.156], dtype=np.float32)
_RIM: Final = np.array([0.012, 0.022, -0.050], dtype=np.float32)
_HALO: Final = np.array([-0.022, -0.012, 0.004], dtype=np.float32)
_NUCLEUS: Final = np.array([0.340, 0.650, -0.085], dtype=np.float32)
_CYTOPLASM: Final = np.array([0.055, 0.180, -0.030], dtype=np.float32)
_PLATELET: Final = np.array([0.370, 0.480, -0.010], dtype=np.float32)

_RED_RADIUS: Final = (43.0, 50.0)
_WHITE_RADIUS: Final = (78.0, 104.0)
_PLATELET_RADIUS: Final = (14.0, 17.0)


class _Disc(NamedTuple):
    """Where a cell goes, in pixels."""

    x: float
    y: float
    radius: float


def draw_smear(
    seed: int,
    *,
    width: int = 640,
    height: int = 480,
    red: int = 12,
    white: int = 1,
    platelets: int = 2,
) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Draw `red`, `white` and `platelets` cells; give the RGB image and every cell's box.

    The same arguments give the same image. Cells keep their share of the image: at 640 x 480
    a red cell is about 100 pixels wide, at 1280 x 960 about 200. Some red cells overlap and some
    are cut by the border; their boxes end there. Boxes include a cell's soft edge, as annotators
    draw them. Raises ValueError for sides below 64 pixels or a negative count.
    """
    if min(width, height) < 64:
        raise ValueError(f"a smear of {width} x {height} pixels; both sides must be at least 64")
    if min(red, white, platelets) < 0:
        raise ValueError(f"{red}, {white} and {platelets} cells; counts must not be negative")
    rng = np.random.default_rng(seed)
    scale = math.sqrt(width * height / _AREA)
    absorbance = np.zeros((height, width, 3), dtype=np.float32)
    taken: list[_Disc] = []
    cells: list[tuple[str, Box]] = []
    # Large and small first: red cells fill what is left, as they do on a slide.
    for _ in range(white):
        radius = scale * float(rng.uniform(*_WHITE_RADIUS))
        disc = _place(rng, (width, height), taken, radius, inside=0.6, gap=(6 * scale, math.inf))
        cells.append((WHITE, _white(rng, absorbance, disc, scale)))
    for _ in range(platelets):
        radius = scale * float(rng.uniform(*_PLATELET_RADIUS))
        disc = _place(rng, (width, height), taken, radius, inside=1.2, gap=(9 * scale, math.inf))
        # A red cell that overlaps must not hide a platelet, which is hardly larger than that.
        taken[-1] = disc._replace(radius=disc.radius + 12 * scale)
        cells.append((PLATELET, _platelet(rng, absorbance, disc, scale)))
    for _ in range(red):
        radius = scale * float(rng.uniform(*_RED_RADIUS))
        apart = (3 * scale, math.inf) if rng.random() < 0.7 else (-18 * scale, -6 * scale)
        disc = _place(rng, (width, height), taken, radius, inside=0.2, gap=apart)
        cells.append((RED, _red(rng, absorbance, disc, scale)))
    _debris(rng, absorbance, scale)
    light = _illumination(rng, width, height)[..., None] * _BACKGROUND * np.exp(-absorbance)
    return Image.fromarray(_photograph(rng, light)), cells


def sample_jpeg() -> bytes:
    """The page's sample image, `static/sample.jpg`, as a JPEG file."""
    image, _ = draw_smear(SAMPLE_SEED, red=13, platelets=3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _place(
    rng: np.random.Generator,
    size: tuple[int, int],
    taken: list[_Disc],
    radius: float,
    *,
    inside: float,
    gap: tuple[float, float],
) -> _Disc:
    """A place whose distance to the nearest cell is within `gap` pixels (below 0: they overlap).

    Where there is none, the freest that was seen.

    Its centre is at least `inside` radii away from the border. The place is added to `taken`.
    """
    best, best_room = _Disc(0.0, 0.0, radius), -math.inf
    for _ in range(400):
        margins = (min(inside * radius, side / 2) for side in size)
        x, y = (
            float(rng.uniform(margin, side - margin))
            for margin, side in zip(margins, size, strict=True)
        )
        room = min(
            (math.hypot(x - o.x, y - o.y) - radius - o.radius for o in taken), default=math.inf
        )
        if room > best_room:
            best, best_room = _Disc(x, y, radius), room
        if gap[0] <= room <= gap[1]:
            best = _Disc(x, y, radius)
            break
    taken.append(best)
    return best


def _window(
    absorbance: _Field, disc: _Disc, reach: float
) -> tuple[tuple[slice, slice], _Field, _Field]:
    """The part of the image within `reach` pixels of a cell, and each pixel's offset from it."""
    height, width = absorbance.shape[:2]
    x1, x2 = max(0, math.floor(disc.x - reach)), min(width, math.ceil(disc.x + reach))
    y1, y2 = max(0, math.floor(disc.y - reach)), min(height, math.ceil(disc.y + reach))
    y, x = np.mgrid[y1:y2, x1:x2].astype(np.float32)
    return (slice(y1, y2), slice(x1, x2)), x + 0.5 - disc.x, y + 0.5 - disc.y


def _rho(
    rng: np.random.Generator, x: _Field, y: _Field, radius: float, *, oval: float, wobble: float
) -> _Field:
    """Distance from the centre in radii of an irregular oval: 1 on its outline."""
    angle, stretch = rng.uniform(0, math.pi), math.sqrt(rng.uniform(1.0, oval))
    along = (x * math.cos(angle) + y * math.sin(angle)) / stretch
    across = (y * math.cos(angle) - x * math.sin(angle)) * stretch
    theta = np.arctan2(across, along)
    outline = np.full_like(theta, radius)
    for waves in (2, 3, 5):
        bulge, phase = radius * rng.normal(0, wobble / waves), rng.uniform(0, 2 * math.pi)
        outline += bulge * np.cos(waves * theta + phase)
    return (np.hypot(along, across) / outline).astype(np.float32)


def _cloud(rng: np.random.Generator, x: _Field, y: _Field, wavelength: float) -> _Field:
    """Smooth texture around 0 with standard deviation 1, from waves of about one length."""
    waves = 14
    total = np.zeros_like(x)
    for _ in range(waves):
        angle = rng.uniform(0, 2 * math.pi)
        k = 2 * math.pi / (wavelength * rng.uniform(0.7, 1.6))
        phase = rng.uniform(0, 2 * math.pi)
        total += np.cos(k * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    return total * np.float32(math.sqrt(2 / waves))


def _grain(rng: np.random.Generator, x: _Field, y: _Field, scale: float) -> _Field:
    """Granules of several sizes, standard deviation about 1.7."""
    return (
        _cloud(rng, x, y, 5 * scale) + _cloud(rng, x, y, 9 * scale) + _cloud(rng, x, y, 17 * scale)
    )


def _inside(distance: _Field, softness: float) -> _Field:
    """1 where `distance` is well below 0, 0 well above, smooth over about 2 * softness."""
    steepness = np.clip(distance * (3 / softness), -30, 30)
    share: _Field = (1 / (1 + np.exp(steepness))).astype(np.float32)
    return share


def _extent(window: tuple[slice, slice], silhouette: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(silhouette.any(axis=1)), np.flatnonzero(silhouette.any(axis=0))
    y, x = window[0].start, window[1].start
    return (
        float(x + columns[0]),
        float(y + rows[0]),
        float(x + columns[-1] + 1),
        float(y + rows[-1] + 1),
    )


def _red(rng: np.random.Generator, absorbance: _Field, disc: _Disc, scale: float) -> Box:
    """A disc that is thin in its middle: pale centre, darker ring, magenta rim, light halo."""
    window, x, y = _window(absorbance, disc, 1.5 * disc.radius)
    rho = _rho(rng, x, y, disc.radius, oval=1.16, wobble=0.05)
    strength = max(0.7, math.exp(rng.normal(0.05, 0.25)))
    pallor, spread = rng.uniform(0.1, 1.2), rng.uniform(0.38, 0.55)
    edge = _inside((rho - 0.96) * disc.radius, 5.0 * scale)
    thickness = edge * strength * (1 - pallor * np.exp(-((rho / spread) ** 3)))
    thickness *= 1 + 0.03 * _cloud(rng, x, y, 40 * scale)
    rim = edge * strength * np.exp(-(((rho - 0.90) / 0.09) ** 2) / 2)
    halo = np.exp(-(((rho - 1.12) / 0.06) ** 2) / 2)
    absorbance[window] += (
        thickness[..., None] * _HAEMOGLOBIN + rim[..., None] * _RIM + halo[..., None] * _HALO
    )
    return _extent(window, rho < 1.14)


def _white(rng: np.random.Generator, absorbance: _Field, disc: _Disc, scale: float) -> Box:
    """Granular pale cytoplasm around a nucleus of three to five lobes in a chain."""
    window, x, y = _window(absorbance, disc, 1.35 * disc.radius)
    rho = _rho(rng, x, y, disc.radius, oval=1.15, wobble=0.05)
    body = _inside((rho - 0.95) * disc.radius, 9.0 * scale)
    granules = 1 + 0.14 * _grain(rng, x, y, scale) + 0.2 * _cloud(rng, x, y, 40 * scale)
    nucleus = _inside(_lobes(rng, x, y, disc.radius), 4.0 * scale)
    chromatin = 1 + 0.03 * _grain(rng, x, y, scale) + 0.09 * _cloud(rng, x, y, 28 * scale)
    absorbance[window] += (nucleus * chromatin)[..., None] * _NUCLEUS
    absorbance[window] += ((1 - nucleus) * body * granules)[..., None] * _CYTOPLASM
    return _extent(window, rho < 1.07)


def _lobes(rng: np.random.Generator, x: _Field, y: _Field, radius: float) -> _Field:
    """Distance in pixels to a nucleus: lobes along an arc, melted together where they meet."""
    count = int(rng.integers(3, 6))
    start, turn = rng.uniform(0, 2 * math.pi), rng.uniform(1.1, 1.5) * math.pi
    melt = 0.05 * radius
    near = np.zeros_like(x)
    for lobe in range(count):
        angle = start + turn * lobe / (count - 1)
        reach = radius * rng.uniform(0.40, 0.52)
        lobe_x, lobe_y = x - reach * math.cos(angle), y - reach * math.sin(angle)
        size = radius * rng.uniform(0.27, 0.36)
        rho = _rho(rng, lobe_x, lobe_y, size, oval=1.5, wobble=0.12)
        near += np.exp(np.clip((1 - rho) * size / melt, -40, 40))
    return (-melt * np.log(near)).astype(np.float32)


def _platelet(rng: np.random.Generator, absorbance: _Field, disc: _Disc, scale: float) -> Box:
    """A small granular speck without an outline."""
    window, x, y = _window(absorbance, disc, 2.0 * disc.radius)
    rho = _rho(rng, x, y, disc.radius, oval=1.3, wobble=0.2)
    body = _inside((rho - 0.82) * disc.radius, 4.5 * scale) * rng.uniform(0.8, 1.1)
    granules = 1 + 0.13 * _grain(rng, x, y, scale)
    absorbance[window] += (body * granules)[..., None] * _PLATELET
    return _extent(window, rho < 1.32)


def _debris(rng: np.random.Generator, absorbance: _Field, scale: float) -> None:
    """Specks of dust out of focus: grey rings a few pixels wide, which are no cells."""
    height, width = absorbance.shape[:2]
    for _ in range(int(rng.integers(2, 6))):
        disc = _Disc(rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 5) * scale)
        window, x, y = _window(absorbance, disc, 3 * disc.radius)
        rho = np.hypot(x, y) / disc.radius
        ring = np.exp(-(((rho - 0.8) / 0.3) ** 2)) - 0.6 * np.exp(-(((rho - 1.5) / 0.3) ** 2))
        absorbance[window] += (0.14 * ring)[..., None]


def _illumination(rng: np.random.Generator, width: int, height: int) -> _Field:
    """Uneven light: one side of the field is darker than the other, clouds in between."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.normal(math.pi / 4, 0.6)
    slope = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
    clouds = _cloud(rng, x, y, 0.7 * math.hypot(width, height))
    light: _Field = rng.uniform(0.99, 1.02) + 0.055 * slope + 0.010 * clouds
    return light


def _photograph(rng: np.random.Generator, light: _Field) -> NDArray[np.uint8]:
    """Lens, sensor and colour as a compressed photograph has them."""
    noise = rng.normal(0, 1.6, light.shape[:2]).astype(np.float32)
    blurred = _blur(light + noise[..., None], 0.8)
    # JPEG keeps colour at half the resolution of brightness.
    luma = blurred @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    photo = luma[..., None] + _blur(blurred - luma[..., None], 1.2)
    pixels: NDArray[np.uint8] = np.clip(np.rint(photo), 0, 255).astype(np.uint8)
    return pixels


def _blur(image: _Field, sigma: float) -> _Field:
    """Gaussian blur along both axes; the border is repeated."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.pad(image, pad, mode="edge")
        length = image.shape[axis]
        image = sum(
            (
                np.float32(weight / weights.sum())
                * padded.take(range(shift, shift + length), axis=axis)
                for shift, weight in enumerate(weights)
            ),
            start=np.zeros_like(image),
        )
    return image
