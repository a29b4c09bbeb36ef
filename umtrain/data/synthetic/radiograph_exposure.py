"""From tissue to film: grey scale, collimator, scatter and noise of a synthetic radiograph."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from umtrain.data.synthetic.radiograph_canvas import Canvas

_BAND_ROWS = 192


@dataclass(frozen=True)
class Technique:
    """How one film was taken and processed; all but `shutter_mm` are relative to the full scale.

    contrast_mm: water path over which the grey scale saturates. dose: larger means less noise.
    border: grey outside the collimator. shutter_mm: its distance from left, right, top, bottom.
    """

    contrast_mm: float
    bone_gain: float
    dose: float
    border: float
    shutter_mm: tuple[float, float, float, float]


def choose_technique(rng: np.random.Generator) -> Technique:
    """Return a technique as one department's film differs from the next."""
    shutter_mm = np.where(rng.random(4) < 0.55, rng.uniform(2, 22, 4), -10.0)
    return Technique(
        contrast_mm=float(rng.uniform(150, 230)),
        bone_gain=float(rng.uniform(1.05, 1.55)),
        dose=float(rng.uniform(0.6, 1.8)),
        border=float(rng.choice([0.0, 0.0, 0.9])),
        shutter_mm=(shutter_mm[0], shutter_mm[1], shutter_mm[2], shutter_mm[3]),
    )


def expose(
    spine: Canvas,
    soft: Canvas,
    skeleton: Canvas,
    technique: Technique,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the film (rows, columns) float32, about 0..1, bone bright; uses up `spine`.

    `spine` has the film's resolution; `soft` and `skeleton` share a coarser one.
    """
    water_mm = soft.values * _organs(soft, rng)
    opening = _opening(soft, technique)
    # Thick parts scatter more, which takes contrast away, and let fewer quanta through.
    contrast = technique.bone_gain / (1 + water_mm / 650) * opening
    sigma = opening * (0.006 + 0.011 * (water_mm / 250) ** 1.5) / np.sqrt(technique.dose)
    base = 0.60 * (1 - np.exp(-water_mm / technique.contrast_mm)) * opening
    base += technique.border * (1 - opening) + skeleton.values * contrast
    base += 0.35 * sigma * rng.standard_normal(base.shape, np.float32)
    # A film of constant blur on the patient: each pixel of a coarser one gathers more quanta.
    sigma *= min(1.0, 0.2 / spine.mm_per_px)
    _develop(spine.values, base, contrast, sigma, rng)
    return spine.values


def _develop(
    film: np.ndarray,
    base: np.ndarray,
    contrast: np.ndarray,
    sigma: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Turn `film` into film * contrast + base + noise of `sigma`, in place.

    The three maps are coarse. Band by band, all of it stays in the processor's cache.
    """
    factor = _factor(base.shape, film.shape)
    maps = [Image.fromarray(np.asarray(values, np.float32)) for values in (contrast, base, sigma)]
    band_rows = max(1, _BAND_ROWS // factor)
    for first in range(0, base.shape[0], band_rows):
        last = min(first + band_rows, base.shape[0])
        band = film[first * factor : last * factor]
        gain, offset, spread = (_enlarged(image, factor, first, last, band.shape) for image in maps)
        band *= gain
        band += offset
        noise = rng.standard_normal(band.shape, np.float32)
        noise *= spread
        band += noise


def _organs(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth factor near 1: organs, muscles and folds that no outline tells."""
    factor = np.ones(canvas.values.shape, np.float32)
    for scale_mm, strength in ((45.0, 0.07), (14.0, 0.03), (5.0, 0.012)):
        step_px = max(1, int(scale_mm / 3 / canvas.mm_per_px))
        small = [-(-n // step_px) + 1 for n in factor.shape]
        noise = gaussian_filter(rng.standard_normal(small, np.float32), 2.0)
        image = Image.fromarray(noise / (float(noise.std()) + 1e-6))
        grown = _factor(noise.shape, factor.shape)
        factor += strength * _enlarged(image, grown, 0, image.height, factor.shape)
    return factor


def _opening(canvas: Canvas, technique: Technique) -> np.ndarray:
    """Return how open the collimator is over each pixel, 0..1, with a penumbra of 1.5 mm."""
    rows, columns = canvas.values.shape
    left, right, top, bottom = technique.shutter_mm
    x_mm = np.arange(columns) * canvas.mm_per_px
    y_mm = np.arange(rows) * canvas.mm_per_px
    across = np.minimum(x_mm - left, x_mm[-1] - right - x_mm)
    down = np.minimum(y_mm - top, y_mm[-1] - bottom - y_mm)
    ramps = [np.clip(distance / 1.5 + 0.5, 0, 1) for distance in (down, across)]
    return np.asarray(np.outer(*ramps), np.float32)


def _factor(coarse: tuple[int, ...], fine: tuple[int, ...]) -> int:
    """Return the whole factor by which `coarse` has to grow to cover `fine`."""
    return max(-(-n_fine // n) for n, n_fine in zip(coarse, fine, strict=True))


def _enlarged(
    image: Image.Image, factor: int, first: int, last: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return rows `first` to `last` of `image`, `factor` times larger, cropped to `shape`."""
    size = (image.width * factor, (last - first) * factor)
    box = (0, first, image.width, last)
    enlarged = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(enlarged)[: shape[0], : shape[1]]
