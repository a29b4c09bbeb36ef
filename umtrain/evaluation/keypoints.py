"""How well keypoints measure a spine: errors of the sagittal vertical axis and of each keypoint.

Keypoints are (x, y) in pixels of the stored radiograph, C7 (its centre) before S1 (its posterior
superior corner). Spacings are in mm per pixel, in DICOM's order: (row, column), that is vertical,
horizontal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from umtrain.errors import DataError, UmtrainError
from umtrain.evaluation.agreement import MIN_IMAGES, bland_altman_mm, icc_agreement
from umtrain.evaluation.bootstrap import patient_interval, weighted_mean, weighted_median
from umtrain.evaluation.reasons import Section, without

Floats = NDArray[np.float64]

_ANTERIOR = {"right": 1.0, "left": -1.0}
_NAMES = ("c7", "s1")
_SUCCESS_MM = (2, 2.5, 3, 4, 5)
_NO_IMAGES = "the split has no images"


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
) -> Section:
    """Return the errors of SVA and of each keypoint, quickly, as a dict fit for JSON.

    `true_xy` and `pred_xy` are (n, 2, 2): radiograph, C7 then S1, x then y; `spacing_mm` is (n, 2)
    and `facing` (n,). Keys: `mae_mm` and `median_ae_mm`, the mean and median absolute error of
    SVA; `c7_radial_mm` and `s1_radial_mm`, each {mean, median}; `n`. Without radiographs the
    errors are None, with the reason in `<key>_reason`.

    Raises ValueError for arrays of other shapes, DataError as `sva_mm` does, and UmtrainError if a
    predicted coordinate is not finite.
    """
    return _error_section(_measured(true_xy, pred_xy, spacing_mm, facing))


def keypoint_evidence(
    true_xy: ArrayLike,
    pred_xy: ArrayLike,
    spacing_mm: ArrayLike,
    facing: Sequence[str],
    patients: ArrayLike | None = None,
) -> Section:
    """Return all that a reader needs to judge the keypoints of a split, as a dict fit for JSON.

    The first four are as for `keypoint_metrics`; `patients` (n,) names the patient of each
    radiograph, None makes each a patient. Keys: those of `keypoint_metrics`; `mae_ci_mm` and
    `median_ae_ci_mm`, 95% intervals [low, high] by the bootstrap over patients (see
    `resample_counts`); `bland_altman` (see `bland_altman_mm`) and `icc` (see `icc_agreement`) of
    predicted with true SVA; `success`, {c7, s1}: the share of radiographs whose radial error is at
    most 2, 2.5, 3, 4 and 5 mm; `n_patients`. What cannot be had is None, with the reason in
    `<key>_reason`. Only the bootstrap knows of patients: elsewhere radiographs count as
    independent.

    Raises as `keypoint_metrics` does.
    """
    found = _measured(true_xy, pred_xy, spacing_mm, facing)
    owners = np.arange(len(facing)) if patients is None else np.asarray(patients)
    if owners.shape != (len(facing),):
        raise ValueError(
            f"expected a patient for each of {len(facing)} radiographs; got {owners.shape}"
        )
    return {
        **_error_section(found),
        **_error_intervals(np.abs(found.sva_pred_mm - found.sva_true_mm), owners),
        **_agreement(found.sva_true_mm, found.sva_pred_mm),
        **_success(found.radial_mm),
        "n_patients": int(np.unique(owners).size),
    }


class _Measured(NamedTuple):
    """SVA (n,), true and predicted, and the radial error (n,) of each keypoint."""

    sva_true_mm: Floats
    sva_pred_mm: Floats
    radial_mm: dict[str, Floats]


def _measured(
    true_xy: ArrayLike, pred_xy: ArrayLike, spacing_mm: ArrayLike, facing: Sequence[str]
) -> _Measured:
    true, pred = np.asarray(true_xy, dtype=float), np.asarray(pred_xy, dtype=float)
    spacing = np.asarray(spacing_mm, dtype=float)
    n_images = len(facing)
    if n_images == 0:
        empty = np.empty(0)
        return _Measured(empty, empty, dict.fromkeys(_NAMES, empty))
    if not true.shape == pred.shape == (n_images, 2, 2) or spacing.shape != (n_images, 2):
        raise ValueError(
            f"expected keypoints of shape ({n_images}, 2, 2) and spacings of ({n_images}, 2) for "
            f"{n_images} radiographs; got {true.shape}, {pred.shape} and {spacing.shape}"
        )
    _check_finite(pred)
    return _Measured(
        sva_mm(true[:, 0], true[:, 1], spacing[:, 1], facing),
        sva_mm(pred[:, 0], pred[:, 1], spacing[:, 1], facing),
        {name: radial_error_mm(true[:, i], pred[:, i], spacing) for i, name in enumerate(_NAMES)},
    )


def _error_section(found: _Measured) -> Section:
    errors_mm = np.abs(found.sva_pred_mm - found.sva_true_mm)
    radial_keys = [f"{name}_radial_mm" for name in _NAMES]
    if errors_mm.size == 0:
        return without(_NO_IMAGES, "mae_mm", "median_ae_mm", *radial_keys) | {"n": 0}
    return {
        "mae_mm": float(errors_mm.mean()),
        "median_ae_mm": float(np.median(errors_mm)),
        **{
            key: {"mean": float(radial.mean()), "median": float(np.median(radial))}
            for key, radial in zip(radial_keys, found.radial_mm.values(), strict=True)
        },
        "n": errors_mm.size,
    }


def _error_intervals(errors_mm: Floats, patients: ArrayLike) -> Section:
    if errors_mm.size == 0:
        return without(_NO_IMAGES, "mae_ci_mm", "median_ae_ci_mm")
    return {
        **patient_interval("mae_ci_mm", patients, weighted_mean(errors_mm)),
        **patient_interval("median_ae_ci_mm", patients, weighted_median(errors_mm)),
    }


def _agreement(true_mm: Floats, pred_mm: Floats) -> Section:
    if true_mm.size < MIN_IMAGES:
        reason = f"agreement needs at least {MIN_IMAGES} images; the split has {true_mm.size}"
        return without(reason, "bland_altman", "icc")
    return {
        "bland_altman": bland_altman_mm(true_mm, pred_mm),
        "icc": icc_agreement(np.column_stack([true_mm, pred_mm])),
    }


def _success(radial_mm: dict[str, Floats]) -> Section:
    if radial_mm["c7"].size == 0:
        return without(_NO_IMAGES, "success")
    return {
        "success": {
            name: {f"{limit:g}": float((errors <= limit).mean()) for limit in _SUCCESS_MM}
            for name, errors in radial_mm.items()
        }
    }


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
