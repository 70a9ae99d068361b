"""Metrics against hand-computed values, an independent SSIM, and the published row of an independent implementation."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fg3dgs_jax.inference import metrics

SHARED = Path(os.environ.get("FG3DGS_SHARED", Path(__file__).parents[2] / "shared"))


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_known_error():
    truth = np.full((8, 6, 3), 100, np.uint8)
    prediction = truth.copy()
    prediction[:4] += 51  # a fifth of the range on half of the pixels: mse = 0.04 / 2
    assert metrics.psnr(prediction, truth) == pytest.approx(-10 * np.log10(0.02), abs=1e-5)  # f32 rounding of 51/255
    assert metrics.psnr(prediction, truth, np.arange(8)[:, None] < np.full(6, 4)) == pytest.approx(
        -10 * np.log10(0.04), abs=1e-5
    )
    assert metrics.psnr(truth, truth) == metrics.PSNR_CEILING
    assert np.isnan(metrics.psnr(prediction, truth, np.zeros((8, 6), bool)))


def test_boxes_are_half_open_and_overlaps_count_once():
    truth = np.zeros((10, 10, 3), np.uint8)
    prediction = truth.copy()
    prediction[2, 2] = 255
    one = metrics.psnr_boxes(prediction, truth, np.array([2, 4, 2, 4]))
    assert one == pytest.approx(-10 * np.log10(1 / 4), abs=1e-5)
    assert metrics.psnr_boxes(prediction, truth, np.array([[2, 4, 2, 4], [2, 4, 2, 4]])) == pytest.approx(one)
    assert metrics.psnr_boxes(prediction, truth, np.array([0, 2, 0, 2])) == metrics.PSNR_CEILING
    assert metrics.box_error(prediction, truth, np.array([2, 4, 2, 4])) == pytest.approx(255 / 4)


def test_ssim_equals_its_definition_at_one_pixel_and_in_the_mean():
    a, b = noise(0, 21, 17, 3), noise(1, 21, 17, 3)
    b = ((a.astype(int) * 3 + b) // 4).astype(np.uint8)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def at(row, col):
        """Brute force: weighted moments of the zero-padded 11x11 neighbourhood, mean over channels."""
        x, y = (np.pad(i / 255.0, ((5, 5), (5, 5), (0, 0)))[row : row + 11, col : col + 11] for i in (a, b))
        w = window[..., None]
        mx, my = (w * x).sum((0, 1)), (w * y).sum((0, 1))
        vx, vy, c = (w * x * x).sum((0, 1)) - mx**2, (w * y * y).sum((0, 1)) - my**2, (w * x * y).sum((0, 1)) - mx * my
        return ((2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()

    everywhere = np.array([[at(row, col) for col in range(17)] for row in range(21)])
    corner = np.zeros((21, 17), bool)
    corner[0, 0] = True
    whole, masked = metrics.ssim(a, b, corner)
    assert masked == pytest.approx(everywhere[0, 0], abs=1e-9)  # both in f64
    assert whole == pytest.approx(everywhere.mean(), abs=1e-9)
    assert metrics.ssim(a, a)[0] == pytest.approx(1.0, abs=1e-9)
    assert np.isnan(metrics.ssim(a, b)[1])


def test_mouth_distance_ignores_shifts_and_other_points():
    truth = np.random.default_rng(0).normal(size=(3, 478, 2))
    prediction = truth + np.array([5.0, -3.0])
    prediction[:, 200] += 50.0  # no mouth point
    np.testing.assert_allclose(metrics.mouth_distance(prediction, truth), 0.0, atol=1e-12)
    prediction[1, 13, 1] += 20.0  # one of 20 points: it moves 19, the mean takes 1 away from each of the others
    np.testing.assert_allclose(metrics.mouth_distance(prediction, truth), [0.0, 1.9, 0.0], atol=1e-12)
    truth[2] = np.nan
    assert np.isnan(metrics.mouth_distance(prediction, truth)[2])


def test_lip_opening_and_correlation():
    points = np.zeros((5, 478, 2))
    points[:, 14, 1] = [1, 2, 3, 4, 5]
    opening = metrics.lip_opening(points)
    np.testing.assert_allclose(opening, [1, 2, 3, 4, 5])
    assert metrics.correlation(opening, -2 * opening) == pytest.approx(-1.0)
    assert metrics.correlation(opening, [1, 2, np.nan, 4, 5]) == pytest.approx(1.0)
    assert np.isnan(metrics.correlation(opening, np.ones(5)))


def test_range_ratio_tells_a_timid_copy_from_a_full_one():
    truth = np.array([1.0, 4.0, 2.0, np.nan, 6.0])
    assert metrics.range_ratio(0.5 * truth + 3.0, truth) == pytest.approx(0.5)
    assert metrics.range_ratio([9.0, 1.0, 4.0, 7.0, 2.0], truth) == pytest.approx(
        np.std([9, 1, 4, 2]) / np.std([1, 4, 2, 6])
    )
    assert np.isnan(metrics.range_ratio(truth, np.ones(5))) and np.isnan(metrics.range_ratio(truth[:2], truth[:2]))


def test_jitter_is_the_second_difference_and_does_not_cross_gaps():
    ids = np.array([0, 1, 2, 3, 50, 51, 52, 53])
    steady = np.zeros((8, 4, 2))
    steady[:, :, 0] = ids[:, None] * 2.0  # constant speed: no jitter, though ids jump
    assert metrics.jitter(steady, ids) == pytest.approx(0.0, abs=1e-12)
    shaken = steady.copy()
    shaken[:, :, 1] = [[0], [1], [0], [1], [0], [1], [0], [1]]  # second difference +-2 everywhere
    assert metrics.jitter(shaken, ids) == pytest.approx(2.0)
    assert np.isnan(metrics.jitter(shaken, ids * 2))
    assert np.isnan(metrics.jitter(shaken[:2], ids[:2]))


def test_block_bootstrap_widens_with_correlated_frames():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=240)
    correlated = np.repeat(rng.normal(size=40), 6)  # as many values, a sixth of the information
    narrow, wide = metrics.block_bootstrap(independent), metrics.block_bootstrap(correlated)
    assert narrow.low < narrow.mean < narrow.high
    assert wide.high - wide.low > 1.6 * (narrow.high - narrow.low)  # sqrt(6) = 2.4 in expectation
    assert np.isnan(metrics.block_bootstrap([np.nan]).mean)
    assert metrics.block_bootstrap([1.0, np.nan] * 12) == (1.0, 1.0, 1.0)
    few = metrics.block_bootstrap([1.0, 3.0])
    assert few.mean == 2.0 and np.isnan(few.low) and np.isnan(few.high)  # no pretended certainty


def test_pairing_sees_a_difference_that_hides_in_the_spread():
    rng = np.random.default_rng(0)
    other = rng.normal(10.0, 3.0, 60)
    ours = other - 1.0 + rng.normal(0.0, 0.1, 60)
    result = metrics.paired_reduction(ours, other)
    assert result["difference"].low > 0.9 and result["difference"].high < 1.1
    assert result["relative"].mean == pytest.approx(1 - ours.mean() / other.mean())
    assert result["relative"].low > 0
    swapped = metrics.paired_reduction(other, ours)
    assert swapped["difference"].mean == pytest.approx(-result["difference"].mean)


def drawn_heads(count=4, size=64):
    """A head that speaks (truth), the same a little late and noisy (prediction), its mask and its mouth's box."""
    rows, columns = np.mgrid[:size, :size] / size
    truth, mask = [], (rows - 0.5) ** 2 / 0.16 + (columns - 0.5) ** 2 / 0.09 < 1
    for k in range(count + 1):
        face = 0.7 + 0.2 * np.sin(9 * columns) * np.cos(7 * rows)
        mouth = ((rows - 0.7) / (0.03 + 0.02 * k)) ** 2 + ((columns - 0.5) / 0.12) ** 2 < 1
        picture = np.where(mask, np.where(mouth, 0.2, face), 0.4)[..., None] * [1.0, 0.8, 0.7]
        truth.append(np.round(255 * picture).astype(np.uint8))
    rng = np.random.default_rng(0)
    late = [np.clip(x + rng.normal(0, 4, x.shape), 0, 255).astype(np.uint8) for x in truth[:-1]]
    return late, truth[1:], mask, np.array([size * 5 // 8, size * 7 // 8, size * 3 // 8, size * 5 // 8])


def test_pixel_scores_of_a_drawn_head_agree_with_scipy():
    """PSNR from the definition in f64, SSIM from scipy's filters: nothing here is shared with `metrics`."""
    blur = lambda x: gaussian_filter(x, (1.5, 1.5, 0), mode="constant", truncate=3.5)  # noqa: E731
    for prediction, truth, mask, box in zip(*drawn_heads()[:2], *([x] * 4 for x in drawn_heads()[2:]), strict=True):
        a, b = prediction / 255.0, truth / 255.0
        inside = np.zeros_like(mask)
        inside[box[0] : box[1], box[2] : box[3]] = True
        for where, found in (
            (np.ones_like(mask), metrics.psnr(prediction, truth)),
            (mask, metrics.psnr(prediction, truth, mask)),
            (inside, metrics.psnr_boxes(prediction, truth, box)),
        ):
            assert found == pytest.approx(10 * np.log10(1 / np.mean((a - b)[where] ** 2)), abs=1e-4)  # f32 differences
        centred, other = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2
        joint = blur(a * b) - blur(a) * blur(b)
        contrast = (2 * joint + 0.03**2) / (centred + other + 0.03**2)
        whole = contrast * (2 * blur(a) * blur(b) + 0.01**2) / (blur(a) ** 2 + blur(b) ** 2 + 0.01**2)
        np.testing.assert_allclose(metrics.ssim(prediction, truth, mask), (whole.mean(), whole[mask].mean()), atol=1e-9)


@pytest.fixture(scope="module")
def anchor():
    path = SHARED / "anchors" / "talkinggaussian_man2_256.npz"
    if not path.is_file():
        pytest.skip(f"needs predictions of real footage, which is not distributed: {path} (FG3DGS_SHARED)")
    return dict(np.load(path))


@pytest.mark.slow  # needs real footage, which the repository must not hold
@pytest.mark.parametrize(
    ("name", "whole", "head", "mouth", "ssim_whole", "ssim_head"),
    [
        ("pred", 30.23, 26.52, 26.38, 0.939, 0.848),
        ("pred_static", 30.02, 26.61, 25.43, 0.936, 0.844),
        ("pred_shuffled_audio", 29.28, 25.84, 25.18, 0.929, 0.824),
    ],
)
def test_pixel_scores_of_the_reference_predictions(anchor, name, whole, head, mouth, ssim_whole, ssim_head):
    frames = list(zip(anchor[name], anchor["gt"], anchor["head"], anchor["lips_box"], strict=True))
    close = pytest.approx  # the published figures have two (PSNR) and three (SSIM) decimals
    assert np.mean([metrics.psnr(p, g) for p, g, _, _ in frames]) == close(whole, abs=0.0051)
    assert np.mean([metrics.psnr(p, g, m) for p, g, m, _ in frames]) == close(head, abs=0.0051)
    assert np.mean([metrics.psnr_boxes(p, g, b) for p, g, _, b in frames]) == close(mouth, abs=0.0051)
    similarity = np.mean([metrics.ssim(p, g, m) for p, g, m, _ in frames], axis=0)
    np.testing.assert_allclose(similarity, [ssim_whole, ssim_head], atol=0.00051)


@pytest.mark.slow
def test_landmark_scores_of_the_reference_predictions(anchor):
    pytest.importorskip("mediapipe", reason="needs MediaPipe: pip install 'fg3dgs_jax[preprocess]'")
    model = SHARED / "models" / "face_landmarker.task"
    if not model.is_file():
        pytest.skip(f"needs MediaPipe's landmark model: {model} (FG3DGS_SHARED)")
    from fg3dgs_jax.data.face import track_face

    truth = track_face(anchor["gt"], model).landmarks[..., :2]
    expected = {"pred": (1.14, 0.82), "pred_static": (1.50, 0.17), "pred_shuffled_audio": (1.76, 0.26)}
    for name, (distance, r) in expected.items():
        points = track_face(anchor[name], model).landmarks[..., :2]
        # Two decimals were published; the detector's arithmetic differs a little between processors.
        assert metrics.mouth_distance(points, truth).mean() == pytest.approx(distance, abs=0.011)
        assert metrics.correlation(metrics.lip_opening(points), metrics.lip_opening(truth)) == pytest.approx(
            r, abs=0.011
        )
