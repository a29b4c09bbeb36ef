"""How well keypoints measure a spine: errors of the sagittal vertical axis and of each keypoint.

Keypoints are (x, y) in pixels of the stored radiograph, C7 (its centre) before S1 (its posterior
superior corner). Spacings are in mm per pixel, in DICOM's order: (row, column), that is vertical,
horizontal.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from umtrain.errors import DataError, UmtrainError

Floats = NDArray[np.float64]

_ANTERIOR = {"right": 1.0, "left": -1.0}
_N_RESAMPLES = 2000
_SEED = 0


def sva_mm(
    c7_xy: ArrayLike, s1_xy: ArrayLike, column_spacing_mm: ArrayLike, facing: Sequence[str]
) -> Floats:
    """Return the sagittal vertical axis of each radiograph, (n,), in mm, positive when anterior.

    It is the horizontal distance from the plumb line through the centre of C7 to the posterior
    superior corner of S1: positive when C7 is in front of the corner. `c7_xy` and `s1_xy` are
    (n, 2) pixels, `column_spacing_mm` (n,) is the horizontal spacing, and `facing` says for each
    radiograph which side of the image the patient faces, "left" or "right".

    Raises DataError for any other `facing` and for a spacing that is not positive.
    """
    spacing = _positive(column_spacing_mm)
    ahead_px = np.asarray(c7_xy, dtype=float)[:, 0] - np.asarray(s1_xy, dtype=float)[:, 0]
    signed: Floats = _anterior_signs(facing) * ahead_px * spacing
    return signed


def radial_error_mm(true_xy: ArrayLike, pred_xy: ArrayLike, spacing_mm: ArrayLike) -> Floats:
    """Return the distance between true and predicted keypoints, (n, 2) pixels each: (n,) in mm.

    `spacing_mm` (n, 2) is (row, column); the two may differ. Raises DataError for a spacing that
    is not positive.
    """
    xy_spacing = _positive(spacing_mm)[:, ::-1]
    offset_px = np.asarray(pred_xy, dtype=float) - np.asarray(true_xy, dtype=float)
    distance: Floats = np.linalg.norm(offset_px * xy_spacing, axis=-1)
    return distance


def keypoint_metrics(
    true_xy: ArrayLike, pred_xy: ArrayLike, spacing_mm: ArrayLike, facing: Sequence[str]
) -> dict[str, object]:
    """Return the errors of SVA and of each keypoint as a dict fit for JSON.

    `true_xy` and `pred_xy` are (n, 2, 2): radiograph, C7 then S1, x then y; `spacing_mm` is (n, 2)
    and `facing` (n,). Keys: `mae_mm` and `median_ae_mm`, the mean and median absolute error of
    SVA; `mae_ci_mm` [low, high], its 95% interval by the percentile bootstrap over radiographs
    (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993; 2000 resamples, fixed seed);
    `c7_radial_mm` and `s1_radial_mm`, each {mean, median}; `n`. What cannot be had is None, with
    the reason in `mae_reason` or `mae_ci_reason`.

    Raises ValueError for arrays of other shapes, DataError as `sva_mm` does, and UmtrainError if a
    predicted coordinate is not finite.
    """
    true, pred = np.asarray(true_xy, dtype=float), np.asarray(pred_xy, dtype=float)
    spacing = np.asarray(spacing_mm, dtype=float)
    n_images = len(facing)
    if not true.shape == pred.shape == (n_images, 2, 2) or spacing.shape != (n_images, 2):
        raise ValueError(
            f"expected keypoints of shape ({n_images}, 2, 2) and spacings of ({n_images}, 2) for "
            f"{n_images} radiographs; got {true.shape}, {pred.shape} and {spacing.shape}"
        )
    _check_finite(pred)
    sva_true = sva_mm(true[:, 0], true[:, 1], spacing[:, 1], facing)
    sva_pred = sva_mm(pred[:, 0], pred[:, 1], spacing[:, 1], facing)
    return {
        **_absolute_error_metrics(np.abs(sva_pred - sva_true)),
        "c7_radial_mm": _mean_and_median(radial_error_mm(true[:, 0], pred[:, 0], spacing)),
        "s1_radial_mm": _mean_and_median(radial_error_mm(true[:, 1], pred[:, 1], spacing)),
        "n": n_images,
    }


def _absolute_error_metrics(errors_mm: Floats) -> dict[str, object]:
    summary = _mean_and_median(errors_mm)
    metrics: dict[str, object] = {
        "mae_mm": summary["mean"],
        "median_ae_mm": summary["median"],
        "mae_ci_mm": None,
    }
    if errors_mm.size == 0:
        return metrics | {"mae_reason": "the split has no images"}
    if errors_mm.size == 1:
        return metrics | {"mae_ci_reason": "one image has no spread to resample"}
    return metrics | {"mae_ci_mm": _bootstrap_interval(errors_mm)}


def _bootstrap_interval(errors_mm: Floats) -> list[float]:
    rng = np.random.default_rng(_SEED)
    means = [rng.choice(errors_mm, errors_mm.size).mean() for _ in range(_N_RESAMPLES)]
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def _mean_and_median(values: Floats) -> dict[str, float | None]:
    if values.size == 0:
        return {"mean": None, "median": None}
    return {"mean": float(values.mean()), "median": float(np.median(values))}


def _check_finite(pred_xy: Floats) -> None:
    n_bad = int((~np.isfinite(pred_xy)).any(axis=(1, 2)).sum())
    if n_bad:
        raise UmtrainError(
            f"the keypoints predicted for {n_bad} of {len(pred_xy)} radiographs are not finite "
            "numbers: training diverged; lower the learning rate"
        )


def _anterior_signs(facing: Sequence[str]) -> Floats:
    for index, side in enumerate(facing):
        if side not in _ANTERIOR:
            raise DataError(
                f"radiograph {index}: facing is {side!r}; expected 'left' or 'right', without "
                "which SVA has no sign"
            )
    return np.array([_ANTERIOR[side] for side in facing])


def _positive(spacing_mm: ArrayLike) -> Floats:
    spacing = np.asarray(spacing_mm, dtype=float)
    bad = np.unique(np.nonzero(~(np.isfinite(spacing) & (spacing > 0)))[0])
    if bad.size:
        raise DataError(
            f"radiograph {bad[0]}: the spacing is {spacing[bad[0]]}; expected mm per pixel above 0"
        )
    return spacing
