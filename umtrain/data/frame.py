"""Where the image the network sees lies on the stored image, as 2×3 affine maps.

A map takes (x, y) of one frame to (x, y) of another: xy' = map[:, :2] @ xy + map[:, 2]. Pixel
centres are at whole numbers in both, so a pixel covers [i - 0.5, i + 0.5).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Affine = NDArray[np.float64]

_WIDTH_MULTIPLE_PX = 64


@dataclass(frozen=True, slots=True)
class Letterbox:
    """A stored image scaled, aspect kept, into a network frame, centred, zeros around it."""

    height_px: int
    width_px: int
    inner_height_px: int
    inner_width_px: int
    to_network: Affine

    @property
    def top_px(self) -> int:
        """The first row of the frame that the image covers."""
        return (self.height_px - self.inner_height_px) // 2

    @property
    def left_px(self) -> int:
        """The first column of the frame that the image covers."""
        return (self.width_px - self.inner_width_px) // 2


def network_width_px(res: int, aspect: float) -> int:
    """Return the width of a frame `res` high: res * aspect to the nearest 64, at least 64."""
    return max(1, round(res * aspect / _WIDTH_MULTIPLE_PX)) * _WIDTH_MULTIPLE_PX


def plan_letterbox(shape: tuple[int, int], height_px: int, width_px: int) -> Letterbox:
    """Return how an image of `shape` (rows, columns) is placed in a height × width frame."""
    scale = min(height_px / shape[0], width_px / shape[1])
    inner_height = max(1, min(height_px, round(shape[0] * scale)))
    inner_width = max(1, min(width_px, round(shape[1] * scale)))
    scale_x, scale_y = inner_width / shape[1], inner_height / shape[0]
    left, top = (width_px - inner_width) // 2, (height_px - inner_height) // 2
    to_network = np.array(
        [
            [scale_x, 0.0, 0.5 * scale_x - 0.5 + left],
            [0.0, scale_y, 0.5 * scale_y - 0.5 + top],
        ]
    )
    return Letterbox(height_px, width_px, inner_height, inner_width, to_network)


def apply_letterbox(pixels: NDArray[np.uint16], box: Letterbox) -> NDArray[np.uint16]:
    """Return uint16 (rows, columns) `pixels` as the uint16 (height, width) frame of `box`.

    Shrinking averages over the area that an output pixel covers (a triangle filter).
    """
    frame = np.zeros((box.height_px, box.width_px), np.uint16)
    inner = Image.fromarray(pixels.astype(np.float32)).resize(
        (box.inner_width_px, box.inner_height_px), Image.Resampling.BILINEAR
    )
    rows = slice(box.top_px, box.top_px + box.inner_height_px)
    columns = slice(box.left_px, box.left_px + box.inner_width_px)
    frame[rows, columns] = np.rint(np.asarray(inner))
    return frame


def compose(second: Affine, first: Affine) -> Affine:
    """Return the map that applies `first`, then `second`."""
    linear = second[:, :2] @ first[:, :2]
    return np.column_stack([linear, second[:, :2] @ first[:, 2] + second[:, 2]])


def inverse(forward: Affine) -> Affine:
    """Return the map that takes back what `forward` does."""
    linear = np.linalg.inv(forward[:, :2])
    return np.column_stack([linear, -linear @ forward[:, 2]])


def transform(points_xy: NDArray[np.floating], forward: Affine) -> NDArray[np.float64]:
    """Return the (n, 2) points after the map."""
    moved: NDArray[np.float64] = points_xy @ forward[:, :2].T + forward[:, 2]
    return moved
