"""From the map of a slide's patches to the slide: a few features and a logistic regression.

As in Wang et al., "Deep Learning for Identifying Metastatic Breast Cancer", arXiv:1606.05718,
which took features of the tumour map's largest regions to a classifier of slides.

# Note: [Maps of training slides]
The slide model learns from the maps of the slides that the patch network was trained on. Such
maps are better than those of new slides. Seen after 60 steps on 39 synthetic slides: the mean log
odds of the likeliest patch were 2.9 in positive and 0.6 in negative training slides, 2.4 and 1.0 in
those for test. So probabilities are a little too certain, while the order of slides, and with it
the AUC, hardly suffers: the features of both kinds of slides move towards each other. Cross-fitting
would mend it at the cost of one more patch network for each fold, several times the whole training;
it is left out. The penalty is strong instead, the features are few, patches are drawn anew in
every epoch, and the operating point is chosen on the validation split.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from umtrain.errors import RunError
from umtrain.evaluation.probability_map import ProbabilityMap
from umtrain.files import write_json

Floats = NDArray[np.float64]

FEATURES = (
    "max_log_odds",
    "top_log_odds",
    "share_above_0.5",
    "share_above_0.9",
    "largest_share",
    "largest_mean",
)
_N_TOP = 5
# Probabilities are cut off here before their log odds are taken.
_LEAST_PROB = 1e-4
# Inverse strength of the penalty on the coefficients of the scaled features.
_C = 0.1
_EIGHT_NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class SlideModel:
    """A logistic regression on scaled features, one number each a feature."""

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    n_slides: int

    def probability(self, features: ArrayLike) -> Floats:
        """Return the probability of the positive class of each row of `features`: (n,)."""
        values = np.asarray(features, dtype=np.float64).reshape(-1, len(self.features))
        scaled = (values - self.mean) / np.asarray(self.scale)
        probability: Floats = expit(scaled @ np.asarray(self.coefficients) + self.intercept)
        return probability


def map_features(values: ProbabilityMap) -> Floats:
    """Return FEATURES of a map's probabilities of cancer: float64 (n_features,).

    `max_log_odds` and `top_log_odds`: log odds of the largest, and the mean of those of the 5
    largest. `share_above_*`: share of the patches with tissue. `largest_*`: the largest region of
    patches above 0.5 that touch at sides or corners, as share of the patches with tissue, and the
    mean probability in it; 0 if there is none. A slide without tissue has no cancer anywhere.
    """
    cancer = values.cancer.astype(np.float64)
    n_tissue = max(1, int(values.tissue.sum()))
    top = np.sort(cancer[values.tissue])[::-1][:_N_TOP] if values.tissue.any() else np.zeros(1)
    log_odds = logit(np.clip(top, _LEAST_PROB, 1 - _LEAST_PROB))
    n_largest, largest_mean = _largest_region(cancer)
    return np.array(
        [
            log_odds[0],
            log_odds.mean(),
            (cancer > 0.5).sum() / n_tissue,
            (cancer > 0.9).sum() / n_tissue,
            n_largest / n_tissue,
            largest_mean,
        ]
    )


def _largest_region(cancer: Floats) -> tuple[int, float]:
    regions, n_regions = ndimage.label(cancer > 0.5, structure=_EIGHT_NEIGHBOURS)
    if n_regions == 0:
        return 0, 0.0
    sizes = np.bincount(regions.ravel())[1:]
    largest = int(np.argmax(sizes)) + 1
    return int(sizes[largest - 1]), float(cancer[regions == largest].mean())


def fit_slide_model(features: ArrayLike, labels: ArrayLike) -> SlideModel:
    """Return the model of (n, n_features) `features` to `labels` (n,), 0 or 1, both present.

    Features are scaled to mean 0 and deviation 1; the coefficients have an L2 penalty.
    See Note: [Maps of training slides].
    """
    values, truth = np.asarray(features, dtype=np.float64), np.asarray(labels)
    scaler = StandardScaler().fit(values)
    regression = LogisticRegression(C=_C).fit(scaler.transform(values), truth)
    return SlideModel(
        FEATURES,
        tuple(scaler.mean_.tolist()),
        tuple(scaler.scale_.tolist()),
        tuple(regression.coef_[0].tolist()),
        float(regression.intercept_[0]),
        len(truth),
    )


def write_slide_model(path: Path, model: SlideModel) -> None:
    """Write `model` to `path` as JSON, atomically."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, asdict(model))


def read_slide_model(path: Path) -> SlideModel:
    """Return what `write_slide_model` wrote.

    Raises RunError if the file is missing, damaged or of other features than this version's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = SlideModel(
            tuple(map(str, values["features"])),
            mean=tuple(map(float, values["mean"])),
            scale=tuple(map(float, values["scale"])),
            coefficients=tuple(map(float, values["coefficients"])),
            intercept=float(values["intercept"]),
            n_slides=int(values["n_slides"]),
        )
    except FileNotFoundError:
        raise RunError(
            f"{path}: no such slide model; the run ended before it was fitted, train again"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path}: not readable as a slide model ({error!r}); train again, or restore the file"
        ) from error
    n_numbers = {len(model.mean), len(model.scale), len(model.coefficients)}
    if model.features != FEATURES or n_numbers != {len(FEATURES)}:
        raise RunError(
            f"{path}: is about the features {', '.join(model.features)}, expected "
            f"{', '.join(FEATURES)}; train again with this version"
        )
    return model
