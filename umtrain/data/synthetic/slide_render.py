"""Draws a scene strip by strip: stain maps first, then colours by Beer and Lambert's law."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umtrain.data.synthetic.slide_scene import CELL_PX, Scene
from umtrain.data.synthetic.tissue import (
    TEXTURE_PX,
    Floats,
    Stains,
    stroma_texture,
    tileable_noise,
)

_BLOCK_PX = 512
_HAEMATOXYLIN_OD, _EOSIN_OD = 1.75, 1.1
_HAEMATOXYLIN_RGB = (0.60, 0.70, 0.33)
_EOSIN_RGB = (0.12, 0.85, 0.40)


def stain_table(seed: int) -> NDArray[np.uint32]:
    """Return a slide's colours: red, green, blue, 0 packed in a uint32 per (haematoxylin, eosin).

    The two stain vectors, their strength and the white of the lamp vary from slide to slide, as
    between laboratories and scanners (Macenko et al., ISBI 2009; Ruifrok and Johnston, 2001).
    """
    rng = np.random.default_rng((seed, 2))
    lamp = np.array([244, 243, 245]) + rng.uniform(-5, 6, 3)
    level = np.arange(256) / 255
    density = np.zeros((256, 256, 3))
    for axis, (vector, od) in enumerate(
        ((_HAEMATOXYLIN_RGB, _HAEMATOXYLIN_OD), (_EOSIN_RGB, _EOSIN_OD))
    ):
        turned = np.array(vector) + rng.normal(0, 0.035, 3)
        strength = od * rng.uniform(0.85, 1.15) / np.linalg.norm(turned)
        stained = level[:, None] * strength * np.clip(turned, 0.01, None)
        density += stained[:, None, :] if axis == 0 else stained[None, :, :]
    table = np.zeros((256, 256, 4), dtype=np.uint8)
    table[..., :3] = np.clip(lamp * np.exp(-density) + 0.5, 0, 255)
    return table.view(np.uint32).reshape(-1)


class SlideRenderer:
    """Draws any rows of one scene, the same whatever rows are asked for."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.table = stain_table(seed)
        self.texture = _packed_texture()
        self.tops = np.array([stamp.y for stamp in scene.stamps])
        self.tallest_px = max((len(stamp.sprite.opacity) for stamp in scene.stamps), default=0)

    def strip(self, first: int, last: int) -> Stains:
        """Return rows `first` to `last` (exclusive), uint8 (rows, size, 3), RGB."""
        size_px = self.scene.size_px
        stains = np.empty((2, last - first, size_px), dtype=np.uint8)
        for left in range(0, size_px, _BLOCK_PX):
            right = min(left + _BLOCK_PX, size_px)
            stains[:, :, left:right] = self._ground(first, last, left, right)
        self._stamp(stains, first)
        rgb = np.empty((last - first, size_px, 3), dtype=np.uint8)
        for left in range(0, size_px, _BLOCK_PX):
            columns = slice(left, min(left + _BLOCK_PX, size_px))
            index = stains[0, :, columns].astype(np.int32) << 8 | stains[1, :, columns]
            packed = self.table.take(index)
            rgb[:, columns] = packed.view(np.uint8).reshape(*packed.shape, 4)[..., :3]
        self._draw_ink(rgb, first)
        return rgb

    def _ground(self, first: int, last: int, left: int, right: int) -> Stains:
        """Return bare glass or stroma, uint8 (2, rows, columns)."""
        grain = _glass_grain()
        rows = np.arange(first, last) % TEXTURE_PX
        columns = np.arange(left, right) % TEXTURE_PX
        glass = grain[:, rows[:, None], columns[None, :]]
        window = (first, last, left, right)
        cells = _cells_of(self.scene.density, window)
        if not cells.any():
            return glass
        shift_y, shift_x = (
            _enlarged(field, window).astype(np.int32)
            for field in (self.scene.shift_y, self.scene.shift_x)
        )
        y = (np.arange(first, last, dtype=np.int32)[:, None] + shift_y) % TEXTURE_PX
        x = (np.arange(left, right, dtype=np.int32)[None, :] + shift_x) % TEXTURE_PX
        texel = self.texture.take(y * TEXTURE_PX + x)
        shade = _enlarged(self.scene.shade, window)
        haematoxylin = (texel >> 8).astype(np.float32) * shade
        eosin = (texel & 255).astype(np.float32) * shade
        if cells.min() < 1:
            # Fibres stick out of a cut edge: dense ones reach further than the gaps between them.
            density = _enlarged(self.scene.density, window)
            edge = np.clip((density - 0.5) * 5 + (eosin - 75) / 80, 0, 1)
            haematoxylin *= edge
            eosin *= edge
        ground = np.stack([haematoxylin, eosin])
        return np.maximum(np.clip(ground, 0, 255).astype(np.uint8), glass)

    def _stamp(self, stains: Stains, first: int) -> None:
        """Lay the sprites that reach into these rows over the ground, in the scene's order."""
        n_rows, size_px = stains.shape[1:]
        begin = int(np.searchsorted(self.tops, first - self.tallest_px))
        end = int(np.searchsorted(self.tops, first + n_rows))
        for stamp in self.scene.stamps[begin:end]:
            n_px = len(stamp.sprite.opacity)
            top, bottom = max(stamp.y, first), min(stamp.y + n_px, first + n_rows)
            left, right = max(stamp.x, 0), min(stamp.x + n_px, size_px)
            if top >= bottom or left >= right:
                continue
            inner = np.s_[top - stamp.y : bottom - stamp.y, left - stamp.x : right - stamp.x]
            opacity = stamp.sprite.opacity[inner].astype(np.uint16)
            for plane, stain in zip(
                stains, (stamp.sprite.haematoxylin, stamp.sprite.eosin), strict=True
            ):
                under = plane[top - first : bottom - first, left:right]
                under[...] = (stain[inner] * opacity + under * (255 - opacity)) // 255

    def _draw_ink(self, rgb: Stains, first: int) -> None:
        ink = self.scene.ink
        if ink is None:
            return
        last = first + len(rgb)
        for left in range(0, self.scene.size_px, _BLOCK_PX):
            right = min(left + _BLOCK_PX, self.scene.size_px)
            window = (first, last, left, right)
            if not _cells_of(ink.opacity, window).any():
                continue
            opacity = np.clip(_enlarged(ink.opacity, window), 0, 1)[..., None]
            filtered = 1 - opacity * (1 - np.array(ink.colour, dtype=np.float32) / 255)
            block = rgb[:, left:right]
            block[...] = block * filtered


def rendered_strips(renderer: SlideRenderer, strip_px: int, threads: int) -> Iterator[Stains]:
    """Yield the slide's strips from top to bottom, `threads` of them in the making at once."""
    size_px = renderer.scene.size_px
    pending: deque[Future[Stains]] = deque()
    with ThreadPoolExecutor(threads) as workers:
        for first in range(0, size_px, strip_px):
            last = min(first + strip_px, size_px)
            pending.append(workers.submit(renderer.strip, first, last))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@lru_cache(maxsize=1)
def _packed_texture() -> NDArray[np.uint16]:
    texture = stroma_texture().astype(np.uint16)
    packed: NDArray[np.uint16] = np.bitwise_or(texture[..., 0] << 8, texture[..., 1])
    return packed.reshape(-1)


@lru_cache(maxsize=1)
def _glass_grain() -> Stains:
    rng = np.random.default_rng(5)
    grain = [np.clip(2 + 1.3 * tileable_noise(rng, TEXTURE_PX, 1, 1), 0, 8) for _ in range(2)]
    return np.stack(grain).astype(np.uint8)


def _span(first: int, last: int, n_cells: int) -> tuple[int, int]:
    """Return the cells, one more on each side, that pixels `first` to `last` depend on."""
    return max(first // CELL_PX - 2, 0), min(math.ceil(last / CELL_PX) + 2, n_cells)


def _cells_of(field: Floats, window: tuple[int, int, int, int]) -> Floats:
    first, last, left, right = window
    return field[slice(*_span(first, last, len(field))), slice(*_span(left, right, len(field)))]


def _enlarged(field: Floats, window: tuple[int, int, int, int]) -> Floats:
    """Return the pixels of `window` (first and last row, left and right column) of a field."""
    first, last, left, right = window
    top, start = _span(first, last, len(field))[0], _span(left, right, len(field))[0]
    cells = Image.fromarray(_cells_of(field, window))
    box = (
        left / CELL_PX - start,
        first / CELL_PX - top,
        right / CELL_PX - start,
        last / CELL_PX - top,
    )
    size = (right - left, last - first)
    return np.asarray(cells.resize(size, Image.Resampling.BICUBIC, box=box))
