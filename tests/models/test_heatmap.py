"""Heatmaps decode to the keypoints they were made from, and the loss brings them there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from umtrain import models
from umtrain.models.heatmap import KeypointLoss, decode, target_heatmaps
from umtrain.models.norm import set_eval_statistics
from umtrain.models.resunet35 import HEATMAP_STRIDE

ROWS, COLUMNS = 48, 40


def keypoint(x: float, y: float) -> Tensor:
    return torch.tensor([[[x, y]]])


def logits_peaked_at(xy: Tensor, sigma_px: float = 2.0) -> Tensor:
    return target_heatmaps(xy, (ROWS, COLUMNS), HEATMAP_STRIDE, sigma_px).log().clamp(min=-50)


@settings(deadline=None, max_examples=200)
@given(
    x=st.floats(16, HEATMAP_STRIDE * COLUMNS - 17),
    y=st.floats(16, HEATMAP_STRIDE * ROWS - 17),
    sigma_px=st.floats(0.7, 2.0),
)
def test_a_gaussian_decodes_to_its_centre(x: float, y: float, sigma_px: float) -> None:
    decoded = decode(logits_peaked_at(keypoint(x, y), sigma_px), HEATMAP_STRIDE)
    torch.testing.assert_close(decoded, keypoint(x, y), rtol=0, atol=0.05)


@settings(deadline=None)
@given(
    x=st.floats(-0.5, HEATMAP_STRIDE * COLUMNS - 0.5),
    y=st.floats(-0.5, HEATMAP_STRIDE * ROWS - 0.5),
)
def test_near_the_border_decoding_is_off_by_less_than_two_heatmap_pixels(
    x: float, y: float
) -> None:
    decoded = decode(logits_peaked_at(keypoint(x, y)), HEATMAP_STRIDE)
    assert (decoded - keypoint(x, y)).abs().max() < 2 * HEATMAP_STRIDE


def test_each_image_and_keypoint_decodes_by_itself() -> None:
    keypoints = torch.tensor([[[20.0, 30.0], [50.5, 61.25]], [[33.3, 70.7], [41.0, 22.0]]])
    decoded = decode(logits_peaked_at(keypoints), HEATMAP_STRIDE)
    torch.testing.assert_close(decoded, keypoints, rtol=0, atol=0.05)


def test_pixel_centres_are_integers_of_the_input_frame() -> None:
    logits = torch.full((1, 1, ROWS, COLUMNS), -50.0)
    logits[0, 0, 11, 20] = 50.0
    assert decode(logits, 1).tolist() == [[[20.0, 11.0]]]
    assert decode(logits, 2).tolist() == [[[40.5, 22.5]]]


def test_a_weaker_second_peak_does_not_pull() -> None:
    strong, weak = logits_peaked_at(keypoint(20.0, 20.0)), logits_peaked_at(keypoint(60.0, 70.0))
    both = torch.logaddexp(strong, weak - 0.5)
    torch.testing.assert_close(
        decode(both, HEATMAP_STRIDE), keypoint(20.0, 20.0), rtol=0, atol=0.05
    )


def test_a_lone_bright_pixel_is_no_peak() -> None:
    logits = logits_peaked_at(keypoint(20.0, 20.0))
    logits[0, 0, 40, 30] = logits.max() + 1
    decoded = decode(logits, HEATMAP_STRIDE)
    torch.testing.assert_close(decoded, keypoint(20.0, 20.0), rtol=0, atol=0.05)


def test_decoding_has_a_gradient_towards_the_peak() -> None:
    logits = logits_peaked_at(keypoint(40.0, 40.0)).requires_grad_()
    decode(logits, HEATMAP_STRIDE)[..., 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 20, 22] > 0 > logits.grad[0, 0, 20, 17]


def test_bf16_logits_decode_in_float32() -> None:
    decoded = decode(logits_peaked_at(keypoint(40.0, 40.0)).bfloat16(), HEATMAP_STRIDE)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, keypoint(40.0, 40.0), rtol=0, atol=0.1)


@given(x=st.floats(-1e4, 1e4), y=st.floats(-1e4, 1e4))
def test_targets_are_distributions_wherever_the_keypoint_is(x: float, y: float) -> None:
    target = target_heatmaps(keypoint(x, y), (ROWS, COLUMNS), HEATMAP_STRIDE)
    assert target.min() >= 0
    assert target.sum().item() == pytest.approx(1, abs=1e-5)


def test_loss_is_zero_on_the_target_and_grows_with_the_distance() -> None:
    loss = KeypointLoss(HEATMAP_STRIDE)
    true = keypoint(40.0, 40.0)
    losses = [loss(logits_peaked_at(keypoint(40.0 + d, 40.0)), true).item() for d in (0, 1, 4, 16)]
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses == sorted(losses)


def test_loss_is_the_divergence_worked_by_hand() -> None:
    # A uniform heatmap: log(number of pixels) less the entropy of the Gaussian, log(2πeσ²).
    loss = KeypointLoss(HEATMAP_STRIDE)(torch.zeros(1, 1, ROWS, COLUMNS), keypoint(40.0, 48.0))
    gaussian_entropy = torch.log(torch.tensor(2 * torch.pi * torch.e * 2.0**2))
    expected = torch.log(torch.tensor(float(ROWS * COLUMNS))) - gaussian_entropy
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_keypoints_outside_the_image_are_left_out_of_the_loss() -> None:
    loss = KeypointLoss(HEATMAP_STRIDE)
    heatmaps = torch.randn(1, 2, ROWS, COLUMNS)
    inside, outside = keypoint(40.0, 40.0), keypoint(40.0, -5.0)
    both = torch.cat([inside, outside], dim=1)
    assert loss(heatmaps, both) == loss(heatmaps[:, :1], inside)


def test_an_image_without_keypoints_inside_has_no_loss_and_no_gradient() -> None:
    heatmaps = torch.randn(1, 1, ROWS, COLUMNS, requires_grad=True)
    loss = KeypointLoss(HEATMAP_STRIDE)(heatmaps, keypoint(500.0, 40.0))
    loss.backward()
    assert loss == 0
    assert not heatmaps.grad.any()


def radiographs(n_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise with two blurred discs, the right one larger, and their centres."""
    generator = torch.Generator().manual_seed(seed)
    keypoints = torch.rand(n_images, 2, 2, generator=generator) * torch.tensor([36.0, 96.0]) + 14
    keypoints[:, 1, 0] += 50
    grid = torch.stack(torch.meshgrid(torch.arange(128), torch.arange(128), indexing="xy"), -1)
    offset = (grid.float() - keypoints[:, :, None, None]).norm(dim=-1)
    discs = torch.sigmoid(torch.tensor([4.0, 8.0]).view(1, 2, 1, 1) - offset).sum(1, keepdim=True)
    return discs + 0.2 * torch.randn(n_images, 1, 128, 128, generator=generator), keypoints


def test_resunet_learns_keypoints_from_scratch_at_batch_1() -> None:
    torch.manual_seed(0)
    model: nn.Module = models.create("resunet35", in_channels=1, n_outputs=2)
    set_eval_statistics(model, "image")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = KeypointLoss(HEATMAP_STRIDE)
    for image, keypoints in zip(*(t.split(1) for t in radiographs(60, seed=0)), strict=True):
        optimizer.zero_grad()
        criterion(model(image), keypoints).backward()
        optimizer.step()
    unseen, true = radiographs(8, seed=1)
    with torch.no_grad():
        error_px = (decode(model.eval()(unseen), HEATMAP_STRIDE) - true).norm(dim=-1)
    assert error_px.median() < 2


def test_autocast_does_not_coarsen_the_positions():
    keypoints = torch.tensor([[[401.3, 700.7], [255.6, 33.2]]])
    logits = target_heatmaps(keypoints, (512, 256), 2).clamp(min=1e-30).log()
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(logits, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, keypoints, atol=0.05, rtol=0)
