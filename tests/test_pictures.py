"""Pictures for people: sizes, placement and that a failed write leaves nothing."""

import cv2
import numpy as np
import pytest

from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import pictures


def grey(height, width, level=128):
    return np.full((height, width, 3), level, np.uint8)


def test_error_heat_is_black_where_equal_and_brighter_with_the_error():
    truth = grey(4, 3)
    prediction = truth.copy()
    prediction[0] += 20
    prediction[1] += 64
    heat = pictures.error_heat(prediction, truth).astype(int).sum(axis=-1)
    assert (heat[2:] < 12).all()  # the colour map's black is (3, 0, 0)
    assert (heat[2] < heat[0]).all() and (heat[0] < heat[1]).all()


def test_side_by_side_holds_the_pictures_unchanged():
    truth, prediction = grey(60, 50, 10), grey(60, 50, 200)
    joined = pictures.side_by_side(truth, prediction, "PSNR 30.1 dB")
    assert joined.shape[1] == 150 and joined.shape[0] > 60
    np.testing.assert_array_equal(joined[:60, :50], truth)
    np.testing.assert_array_equal(joined[:60, 50:100], prediction)
    assert joined[60:, 50:100].max() > 150  # the caption is there


def test_contact_sheet_pads_tiles_of_different_sizes():
    sheet = pictures.contact_sheet([grey(10, 8, 200), grey(6, 20, 100), grey(4, 4, 50)], columns=2)
    assert sheet.shape == (2 * 14, 2 * 24, 3)
    assert (sheet[:10, :8] == 200).all() and (sheet[:6, 24:44] == 100).all() and (sheet[14:18, :4] == 50).all()
    with pytest.raises(ValueError, match="at least one"):
        pictures.contact_sheet([], 3)


def test_spread_includes_both_ends():
    np.testing.assert_array_equal(pictures.spread(10, 4), [0, 3, 6, 9])
    np.testing.assert_array_equal(pictures.spread(2, 9), [0, 1])


def test_save_is_complete_or_absent(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200
    pictures.save(tmp_path / "red.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "red.png"))[0, 0], [0, 0, 200])  # BGR on disk
    with pytest.raises(UserError, match=r"nowhere.*cannot be written"):
        pictures.save(tmp_path / "nowhere" / "a.png", image)
    assert [p.name for p in tmp_path.iterdir()] == ["red.png"]
