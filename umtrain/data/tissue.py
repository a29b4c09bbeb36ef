"""Where the tissue of a slide is, seen at low power: stained pixels are saturated, glass is not."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from umtrain.data.wsi import SlideFrame, read_slide

_N_LEVELS = 256
# The threshold stays between these, of 255: glass lies below the lower one, whatever Otsu makes of
# an empty slide's noise, and stained tissue above the upper one, on a slide that is nothing else.
_SATURATION_MIN = 16
_SATURATION_MAX = 30


def find_tissue(path: Path, res: int) -> tuple[NDArray[np.bool_], SlideFrame]:
    """Return where tissue is in the slide at `path`, and the frame that places it on the slide.

    The tissue is bool (res, res): the whole slide, its longest side `res` pixels.
    Raises DataError if the slide cannot be read.
    """
    image, frame = read_slide(path, res)
    return tissue_mask(image), frame


def tissue_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return bool (rows, columns): where the uint8 (rows, columns, 3) RGB `image` is stained.

    Stained is what is more saturated than Otsu's threshold between glass and tissue (IEEE Trans
    Syst Man Cybern 1979, 9:62), kept within bounds. Pen marks count too. A slightly blurred image
    is looked at: noise does not speckle, and a faint edge is rather in than out.
    """
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(1))
    saturation = np.asarray(blurred.convert("HSV").getchannel("S"))
    counts = np.bincount(saturation.ravel(), minlength=_N_LEVELS)
    threshold = min(max(otsu_threshold(counts), _SATURATION_MIN), _SATURATION_MAX)
    stained: NDArray[np.bool_] = saturation > threshold
    return stained


def otsu_threshold(counts: NDArray[np.int64]) -> int:
    """Return the level that splits a histogram best: levels up to it, and those above.

    `counts` (n_levels,) is how many pixels have each level. The best split has the largest
    variance between the two classes; a histogram of one level has none, and gives 0.
    """
    levels = np.arange(len(counts))
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sum_below = np.cumsum(counts * levels)[:-1]
    sum_above = (counts * levels).sum() - sum_below
    both = (below > 0) & (above > 0)
    if not both.any():
        return 0
    means_apart = sum_below[both] / below[both] - sum_above[both] / above[both]
    between = np.zeros(len(below))
    between[both] = below[both] * above[both] * means_apart**2
    return int(np.argmax(between))
