"""The papers' tables: what each score means on made-up data, and what is written when scores are missing."""

import csv
import io
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from test_sync import random_expert

from fg3dgs_jax.data import audio, face, foreign_weights
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import heldout, inception, lipsync, metrics, page, papers

RNG = np.random.default_rng(0)


def embedded(count=200, late=0, noise=0.1, ids=None):
    """Vectors that agree when the sound is taken `late` frames later."""
    voice = np.abs(RNG.standard_normal((count, 16)))
    at = np.arange(count - 20) if ids is None else np.asarray(ids)
    face = voice[np.minimum(at + late, count - 1)] + noise * np.abs(RNG.standard_normal((len(at), 16)))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (face, voice)]
    return lipsync.Embedded(unit[0], at, unit[1])


def test_windows_begin_where_five_frames_follow_each_other():
    assert lipsync.firsts(np.array([3, 4, 5, 6, 7, 8, 20, 21, 22, 23, 24])).tolist() == [0, 1, 6]
    assert lipsync.firsts(np.array([1, 2, 3])).tolist() == []


@pytest.mark.parametrize("late", [0, 3, -4])
def test_offset_is_found_with_its_sign(late):
    vectors = embedded(late=late, ids=np.arange(20, 180))
    cosines = lipsync.offset_curve(vectors, np.arange(len(vectors.at)))
    assert lipsync.offset_ms(cosines, 25.0, lowest=False) == 40.0 * late
    distances = lipsync.distance_curve(vectors)
    assert lipsync.offset_ms(distances, 25.0, lowest=True) == 40.0 * late
    scores = lipsync.lse(distances)
    assert scores["lse_d"] == pytest.approx(distances.min()) and scores["lse_c"] > 0.1


def test_offsets_without_sound_are_nan():
    curve = lipsync.offset_curve(embedded(count=25), np.arange(5))
    assert np.isnan(curve[0]) and np.isfinite(curve[len(curve) // 2])


def test_frames_apart_or_without_sound_have_no_sync_scores_and_say_why(tmp_path):
    pictures = RNG.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    shown = heldout.Heldout(np.array([0, 1, 2, 3]), pictures, pictures, np.ones(4))
    dataset = SimpleNamespace(audio_path=tmp_path / "a.wav", num_frames=4, fps=25.0)
    networks = papers.Networks(sync=random_expert())
    for reason in ("cannot be read", "five of the frames in a row"):
        table = papers.table(dataset, shown, {"summary": {"psnr": 30.0}}, networks, None)
        assert reason in table["unavailable"]["sync"] and table["rows"]["ours"] == {"psnr": 30.0}
        assert "--syncnet" in table["unavailable"]["lse_c"] and table["curves"] == {}
        audio.save_wav(dataset.audio_path, np.zeros(4 * 640, np.float32))


def test_accuracy_of_a_perfect_and_of_a_deaf_expert():
    rows = np.arange(180)
    perfect = embedded(noise=0.0)
    level = lipsync.threshold(perfect, rows[:90], 5)
    found = lipsync.accuracy(perfect, rows[90:], 5, level)
    assert found["pairs"].mean == 1.0 and found["single"].mean == 1.0
    deaf = perfect._replace(voice=np.roll(perfect.voice[:, ::-1], 50, axis=0))
    found = lipsync.accuracy(deaf, rows, 5, lipsync.threshold(deaf, rows, 5))
    assert 0.4 < found["pairs"].mean < 0.6 and found["pairs"].low < 0.5 < found["pairs"].high
    flat = perfect._replace(voice=np.full_like(perfect.voice, 0.25))
    assert lipsync.accuracy(flat, rows, 5, 0.5)["pairs"].mean == pytest.approx(0.5, abs=0.02)  # ties count half


def track(values):
    units = metrics.UPPER_UNITS + metrics.LOWER_UNITS
    names = tuple(name + side for name in units for side in ("Left", "Right"))
    shapes = np.full((len(values), len(names)), 0.2, np.float32)
    shapes[:, names.index("jawOpenLeft")] = values
    return face.FaceTrack(np.zeros((len(values), 478, 3), np.float32), shapes, names)


def test_aue_is_the_squared_error_in_openfaces_scale():
    truth, ours = track([0.2, 0.2, 0.2]), track([0.2, 0.4, np.nan])
    # The jaw's left and right are averaged: half of 0.2, five times, squared, over the two frames with a face.
    error = metrics.action_unit_error
    assert error(ours, truth, metrics.LOWER_UNITS) == pytest.approx((5 * 0.1) ** 2 / 2, rel=1e-5)
    assert error(ours, truth, metrics.UPPER_UNITS) == 0.0
    assert np.isnan(error(face.FaceTrack(truth.landmarks, truth.blendshapes, ()), truth, metrics.LOWER_UNITS))


def test_motion_in_silence_counts_silent_neighbours_only():
    sound = np.zeros(20 * 640, np.float32)
    sound[5 * 640 : 12 * 640] = 0.1 * RNG.standard_normal(7 * 640)
    silent = papers.silent_frames(sound, 20, 25.0)
    assert silent.tolist() == [True] * 5 + [False] * 7 + [True] * 8
    opening = np.zeros(20)
    opening[6:10] = 100.0  # speech
    opening[13] = 4.0
    assert papers.silence_motion(opening, np.arange(20), silent) == pytest.approx(8.0 / 11)
    assert np.isnan(papers.silence_motion(opening[5:12], np.arange(5, 12), silent))
    assert papers.silent_frames(np.zeros(6400, np.float32), 10, 25.0).all()


@pytest.mark.parametrize("count", [40, 9])
def test_frechet_distance_by_the_matrix_root(count):
    a, b = RNG.standard_normal((count, 12)), 1.5 * RNG.standard_normal((count + 3, 12)) + 0.3
    gap = a.mean(0) - b.mean(0)
    first, second = np.cov(a.T), np.cov(b.T)
    values = scipy.linalg.eigvals(first @ second)
    expected = gap @ gap + np.trace(first + second) - 2.0 * np.sqrt(np.maximum(values.real, 0)).sum()
    # Roots of eigenvalues that are 0 carry half of the digits.
    assert inception.frechet(a, b) == pytest.approx(expected, abs=1e-4)
    assert inception.frechet(a, a) == pytest.approx(0.0, abs=1e-9)


def test_a_wrong_inception_is_named():
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.conv\.kernel"):
        inception.check({})


@pytest.mark.slow  # a network of 22 million parameters
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_inception_parity_with_torchvision(monkeypatch):
    reason = "PyTorch and torchvision are not installed (CONTRIBUTING.md, parity tests)"
    torch = pytest.importorskip("torch", reason=reason)
    torchvision = pytest.importorskip("torchvision", reason=reason)
    torch.manual_seed(0)
    model = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.8, 1.2)
            torch.nn.init.normal_(layer.running_mean, 0.0, 0.05)
    arrays = foreign_weights.inception({name: value.numpy() for name, value in model.state_dict().items()})
    plain, last = torch.nn.functional.avg_pool2d, []

    def pool(x, kernel_size, stride, padding):
        """As FID's network pools: without what lies beyond the border, and by the maximum in the last block."""
        if last:
            return torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)
        return plain(x, kernel_size, stride, padding, count_include_pad=False)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", pool)
    model.Mixed_7c.register_forward_pre_hook(lambda *_: last.append(1))
    model.fc = torch.nn.Identity()
    image = RNG.integers(0, 256, (1, 120, 120, 3), dtype=np.uint8)
    x = torch.tensor(image.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1.0
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = model(x).numpy()
    found = np.asarray(inception.features(arrays, image))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def tables():
    rows = {
        "ground truth": {"ssim": 1.0, "lpips": 0.0, "sync": 0.9, "offset_ms": 0.0},
        "ours": {"psnr": 30.123, "ssim": 0.9, "lpips": 0.05, "sync": 0.8, "offset_ms": -40.0, "lmd": float("nan")},
    }
    table = {
        "rows": rows, "frames": 46, "unavailable": {"fid": "no Inception weights (--inception FILE)"},
        "unreliable": papers.unreliable(46), "curves": {"ours": {"sync": [0.1, 0.8, 0.2]}},
    }  # fmt: skip
    return {"held-out frames <1>": table}


def test_missing_scores_say_so_and_are_no_numbers():
    text = page.to_markdown(tables())
    assert "| ours | 30.12 | 0.900 | 0.0500 | unavailable | - | 0.800 ~ | -40 ~ |" in text
    assert "- unavailable: FID: no Inception weights (--inception FILE)" in text
    assert "- ~ unreliable: sync expert's cosine, A/V offset, ms: 46 frames, fewer than 1000" in text
    rows = list(csv.DictReader(io.StringIO(page.to_csv(tables()))))
    assert [row["row"] for row in rows] == ["ground truth", "ours"]
    assert rows[1]["fid"] == "" and rows[1]["lmd"] == "" and float(rows[1]["psnr"]) == 30.123


class Tags(HTMLParser):
    """Every element closed in order; every source inside the page."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert all(value.startswith("data:") for name, value in attrs if name in ("src", "href"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_everything_in_itself(tmp_path):
    (tmp_path / "heldout.mp4").write_bytes(b"video")
    frames = [
        {"id": i, "psnr_head": 20.0 + i, "psnr_mouth": 25.0, "lip_opening": 3.0, "lip_opening_truth": float("nan")}
        for i in range(5)
    ]
    pictures = RNG.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    heldout = SimpleNamespace(truth=pictures, predictions=pictures)
    text = page.to_html("run <x>", tables(), {"frames": frames}, heldout, [tmp_path / "heldout.mp4"])
    parser = Tags()
    parser.feed(text)
    assert not parser.open and parser.seen.count("video") == 1 and parser.seen.count("img") == page.WORST
    assert parser.seen.count("svg") == 3 and "run &lt;x&gt;" in text and "http" not in text


def test_weights_of_another_kind_are_refused(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"--lpips|x\.pth"):
        papers.load({"lpips": tmp_path / "x.pth"})
    assert papers.load({"lpips": None, "sync": None}) == papers.Networks()
    reasons = papers.missing(papers.Networks(), None)
    assert set(reasons) >= {"lpips", "fid", "lse_c", "lse_d", "sync", "offset_ms", "lmd", "aue_lower"}
