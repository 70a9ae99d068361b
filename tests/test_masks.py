"""Masks, torso and background of a painted portrait whose parts are known."""

import cv2
import numpy as np
import pytest

from fg3dgs_jax.data import layers, masks
from fg3dgs_jax.data.face import NUM_LANDMARKS, POINTS_68, ROW_CHIN, ROW_FOREHEAD
from fg3dgs_jax.types import Label

SIZE = 256
SKIN, NECK, HAIR, SHIRT, WALL = (205, 150, 130), (165, 115, 95), (50, 35, 28), (70, 90, 190), (120, 170, 120)
CENTRE, RADII = (128, 105), (38, 52)  # the face's oval: forehead at row 53, chin at row 157


def portrait(long_hair: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, person mask and the mask of the head, painted."""
    image = np.full((SIZE, SIZE, 3), WALL, np.uint8)
    person, head = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), np.uint8)

    def paint(colour, draw, is_head):
        for target, value in ((image, colour), (person, 255), *(((head, 1),) if is_head else ())):
            draw(target, value)

    paint(SHIRT, lambda t, c: cv2.ellipse(t, (128, 270), (110, 70), 0, 0, 360, c, -1), False)
    paint(NECK, lambda t, c: cv2.rectangle(t, (106, 130), (150, 212), c, -1), False)
    paint(HAIR, lambda t, c: cv2.ellipse(t, (128, 90), (66, 80), 0, 180, 360, c, -1), True)
    length = 190 if long_hair else 112
    for x in (62, 172):
        paint(HAIR, lambda t, c, x=x: cv2.rectangle(t, (x, 90), (x + 22, length), c, -1), True)
    paint(SKIN, lambda t, c: cv2.ellipse(t, CENTRE, RADII, 0, 0, 360, c, -1), True)
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), person, head.astype(bool)


def landmarks() -> np.ndarray:
    points = np.zeros((NUM_LANDMARKS, 2), np.float32) + CENTRE
    angle = np.linspace(-np.pi / 2, 1.5 * np.pi, len(masks.OVAL), endpoint=False)
    points[masks.OVAL] = np.stack([CENTRE[0] + RADII[0] * np.cos(angle), CENTRE[1] + RADII[1] * np.sin(angle)], -1)
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    points[masks.LIPS_OUTER] = np.stack([128 + 16 * np.cos(turn), 135 + 8 * np.sin(turn)], -1)
    points[masks.LIPS_INNER] = np.stack([128 + 12 * np.cos(turn), 135 + 4 * np.sin(turn)], -1)
    points[[13, 14]] = (128, 131), (128, 139)
    points[masks.BROWS, 1] = 85
    for eye, x in ((POINTS_68[36:42], 112), (POINTS_68[42:48], 144)):
        turn = np.pi - np.linspace(0, 2 * np.pi, 6, endpoint=False)
        points[eye] = np.stack([x + 8 * np.cos(turn), 98 - 3 * np.sin(turn)], -1)
    points[ROW_FOREHEAD], points[ROW_CHIN] = (128, 53), (128, 157)
    return points


@pytest.mark.parametrize("long_hair", [False, True])
def test_the_head_is_told_from_neck_and_clothes(long_hair):
    image, person, head = portrait(long_hair)
    points = landmarks()
    ratio = masks.learn_hair([image] * 2, [person] * 2, np.stack([points] * 2))
    labels = masks.label_frame(image, person, points, ratio)
    found = (labels & Label.HEAD) > 0
    overlap = (found & head).sum() / (found | head).sum()
    assert overlap > 0.95  # soft edges are drawn to within about a pixel: 3 % of this head's area
    assert not (labels[person < 100] & (Label.HEAD | Label.TORSO)).any()
    assert ((labels & Label.TORSO) > 0)[170:205, 110:146].all()  # the neck
    assert ((labels & Label.TORSO) > 0)[230:, 60:200].all()
    hair = (labels & Label.HAIR) > 0
    assert hair[15:40, 110:146].all() and not hair[95:140, 105:151].any()
    assert hair[150:180, 66:80].all() == long_hair


def test_lips_inner_mouth_and_eyes_are_parts_of_the_head():
    image, person, _ = portrait(False)
    points = landmarks()
    labels = masks.label_frame(image, person, points, np.zeros(masks.NUM_CELLS, np.float32))
    lips, inner, eyes = ((labels & label) > 0 for label in (Label.LIPS, Label.INNER_MOUTH, Label.EYES))
    assert inner[135, 128] and lips[142, 128] and not (lips & inner).any()
    assert eyes[98, 112] and eyes[98, 144] and not eyes[98, 128]
    for part in (lips, inner, eyes):
        assert ((labels[part] & Label.HEAD) > 0).all() and not (labels[part] & Label.TORSO).any()
    closed = points.copy()
    closed[14] = closed[13]
    assert not (
        masks.label_frame(image, person, closed, np.zeros(masks.NUM_CELLS, np.float32)) & Label.INNER_MOUTH
    ).any()


def test_the_torso_continues_behind_the_chin_and_holds_no_head():
    image, person, _ = portrait(False)
    points = landmarks()
    ratio = masks.learn_hair([image], [person], points[None])
    labels = masks.label_frame(image, person, points, ratio)
    torso = layers.torso_layer(image, person, labels, points)
    assert torso.shape == (SIZE, SIZE, 4)
    assert (torso[140:156, 118:138, 3] == 255).all()  # behind the chin
    assert np.abs(torso[145:156, 118:138, :3].astype(int) - NECK).mean() < 12  # in the neck's colour
    assert (torso[60:110, :, 3] == 0).all()
    below = torso[225:, 60:200]
    np.testing.assert_array_equal(below[..., :3], image[225:, 60:200])


def test_a_neck_is_no_wider_behind_hair_that_hangs_beside_it():
    image, person, _ = portrait(False)
    points = landmarks()
    labels = masks.label_frame(image, person, points, masks.learn_hair([image], [person], points[None]))
    collar = ((labels & Label.TORSO) > 0)[:, 92:104]  # beside the neck, nearer than its half width reaches
    top = int(np.argmax(collar.any(1)))
    labels[130:top, 92:104] = Label.HEAD | Label.HAIR
    torso = layers.torso_layer(image, person, labels, points)
    assert (torso[top - 25 : top - 8, 94:102, 3] == 0).all()
    assert (torso[140:156, 118:138, 3] == 255).all()  # behind the chin as ever


def test_push_pull_keeps_what_is_known_and_continues_smoothly():
    ramp = np.repeat(np.linspace(0, 100, 64, dtype=np.float32)[None], 64, 0)[..., None].repeat(3, 2)
    weight = np.ones((64, 64), np.float32)
    weight[24:40, 24:40] = 0
    filled = layers.push_pull(ramp * weight[..., None], weight)
    np.testing.assert_allclose(filled[weight > 0], ramp[weight > 0], atol=1e-4)
    assert np.abs(filled - ramp)[weight == 0].max() < 15  # a hole of a quarter of the picture, of a range of 100


def test_the_background_is_what_was_seen_beside_the_person():
    random = np.random.default_rng(0)
    wall = random.integers(60, 200, (64, 64, 3), dtype=np.uint8)
    images, persons = [], []
    for k in range(12):
        person = np.zeros((64, 64), np.uint8)
        person[:, 4 * k : 4 * k + 12] = 255
        images.append(np.where(person[..., None] > 0, 255, wall).astype(np.uint8))
        persons.append(person)
    found, seen = layers.background_of(images, persons)
    assert seen == 1.0
    np.testing.assert_array_equal(found, wall)
    still, seen = layers.background_of(images[:1] * 6, persons[:1] * 6)
    assert 0.5 < seen < 1.0
    assert np.abs(still[:, :12].astype(int) - 255).min() > 30  # no trace of the white person


def test_background_that_is_never_far_from_the_person_is_looked_at_all_the_same():
    size, wall = 200, np.random.default_rng(0).integers(60, 200, (200, 200, 3), dtype=np.uint8)
    person = np.zeros((size, size), np.uint8)
    person[:, 80:120] = 255
    image = np.where(person[..., None] > 0, 255, wall).astype(np.uint8)
    image[:, 78:80] = image[:, 120:122] = 255  # a wisp
    found, _ = layers.background_of([image] * 6, [person] * 6)
    np.testing.assert_array_equal(found[:, :77], wall[:, :77])  # 3 pixels of 200: the nearest that is looked
    assert found[:, 78].max() < 200  # and the wisp is none of it


def test_only_the_part_with_the_face_is_the_person():
    person = np.zeros((SIZE, SIZE), np.uint8)
    cv2.ellipse(person, CENTRE, (50, 70), 0, 0, 360, 255, -1)
    alone = person.copy()
    cv2.rectangle(person, (5, 5), (25, 60), 255, -1)
    np.testing.assert_array_equal(masks.main_part(person, landmarks()), alone)


def test_the_guided_filter_keeps_constants_and_edges():
    step = np.zeros((40, 40), np.float32)
    step[:, 20:] = 1
    np.testing.assert_allclose(masks.guided_filter(step, np.full_like(step, 0.3), 4, 1e-3), 0.3, atol=1e-5)
    assert np.abs(masks.guided_filter(step, step, 4, 1e-3) - step).max() < 0.02


def test_a_model_that_sees_hair_takes_the_colours_place():
    image, person, head = portrait(True)
    seen = np.where(head & (np.abs(image.astype(int) - HAIR).sum(-1) < 60), 255, 0).astype(np.uint8)
    labels = masks.label_frame(image, person, landmarks(), np.zeros(masks.NUM_CELLS, np.float32), seen)
    found = (labels & Label.HEAD) > 0
    assert (found & head).sum() / (found | head).sum() > 0.95
