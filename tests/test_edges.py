"""The head's outline: where it is, how it is shown and scored."""

import numpy as np

from fg3dgs_jax.inference import edges, metrics, page
from fg3dgs_jax.types import Label

SIZE = 128


def disc(radius=30, center=(70, 60)):
    rows, cols = np.mgrid[:SIZE, :SIZE]
    inside = (rows - center[0]) ** 2 + (cols - center[1]) ** 2 <= radius**2
    return np.where(inside, np.uint8(Label.HEAD), np.uint8(0))


def test_the_band_lies_along_the_outline():
    found = edges.band(disc())
    rows, cols = np.nonzero(found)
    distance = np.hypot(rows - 70, cols - 60)
    assert 28 <= distance.min() <= distance.max() <= 32.5  # a pixel to each side, two along diagonals
    assert abs(found.sum() - 2 * np.pi * 30 * 2.5) < 120
    assert not edges.band(np.zeros((16, 16), np.uint8)).any()


def test_places_are_on_the_outline():
    found = edges.places(disc())
    assert found["crown"] == (40, 60) and found["neck"] == (100, 60)
    assert found["left"] == (70, 30) and found["right"] == (70, 90)
    assert edges.places(np.zeros((8, 8), np.uint8)) == {}


def test_a_lens_enlarges_what_is_there():
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[40, 60] = (255, 0, 0)
    shown = edges.lens(image, (40, 60))
    edge = SIZE // edges.SHARE * edges.ZOOM
    assert shown.shape == (edge, edge, 3) and (shown[..., 0] == 255).sum() == edges.ZOOM**2
    assert edges.lens(image, (0, 0)).shape == edges.lens(image, (SIZE - 1, SIZE - 1)).shape == shown.shape
    assert edges.sheet(image, image, np.zeros((SIZE, SIZE), np.uint8)) is None


def test_the_error_at_the_outline_is_its_pixels_alone():
    truth, labels = np.full((SIZE, SIZE, 3), 100, np.uint8), disc()
    halo = truth.copy()
    halo[edges.band(labels)] = 130
    assert metrics.mask_error(halo, truth, edges.band(labels)) == 30.0
    inner = truth.copy()
    inner[65:75, 55:65] = 0
    assert metrics.mask_error(inner, truth, edges.band(labels)) == 0.0


def test_the_page_shows_the_worst_outline():
    class Frames:
        truth = predictions = np.zeros((3, SIZE, SIZE, 3), np.uint8)

    rows = [{"id": 7 + i, "psnr_head": 20.0, "edge_error": float(i)} for i in range(3)]
    asked = []

    def labels(index):
        asked.append(index)
        return disc()

    text = page.to_html("run", {}, {"frames": rows}, Frames, [], labels)
    assert "outline" in text and "frame 9: error 2.0 of 255" in text and asked == [9, 8]
    assert "outline" not in page.to_html("run", {}, {"frames": rows}, Frames, [])
