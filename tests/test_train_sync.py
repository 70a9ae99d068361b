"""Training a lip-sync expert: what a batch holds, what the loss asks for, and the command on clips of which is known
what can be learned."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sync import random_expert

from fg3dgs_jax import cli, train_sync
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import console, lipsync
from fg3dgs_jax.losses import sync
from fg3dgs_jax.training import judges, sync_expert
from fg3dgs_jax.training.sync_clips import MARGIN, SyncClip

CONFIG = Path(__file__).parents[1] / "configs" / "sync.py"
RULES = sync_expert.SyncRules(
    width=1 / 32, steps=3, groups=2, windows=5, span=20, rate=1e-3, decay=0.0, seed=3
)  # fmt: skip


def clip(name: str, frames: int, seed: int, told: bool = True) -> SyncClip:
    """Faces that are the darker, from below, the louder it is at that moment; or as it happens (`told` False)."""
    rng = np.random.default_rng(seed)
    loud = np.repeat(rng.random(frames // 3 + 8), 3).astype(np.float32)  # changes every third frame
    seen = loud if told else np.repeat(rng.random(frames // 3 + 8), 3)
    height, width = sync.CROP // 2 + 2 * MARGIN, sync.CROP + 2 * MARGIN
    bright = np.arange(height) < height * (1.0 - 0.8 * seen[:frames, None])
    crops = np.broadcast_to(np.where(bright, 200, 50).astype(np.uint8)[:, :, None, None], (frames, height, width, 3))
    column = np.clip((np.arange(16) / 3.2).astype(int), 0, 4)  # 80 columns a second, 25 frames
    mel = np.broadcast_to(8 * loud[np.arange(frames)[:, None] + column][:, None] - 4, (frames, 80, 16))
    return SyncClip(name, crops, mel.astype(np.float32))


def test_batches_are_stretches_within_their_ranges_and_the_same_again():
    clips = [clip("a", 60, 0), clip("b", 300, 1)]
    ranges = [np.arange(4, 40), np.arange(290)]
    made = [batch for batch, _ in zip(sync_expert.batches(clips, ranges, RULES), range(40), strict=False)]
    again = next(sync_expert.batches(clips, ranges, RULES))
    jax.tree.map(np.testing.assert_array_equal, made[0], again)
    assert made[0].crops.shape == (10, 5, 56, 104, 3) and made[0].mel.shape == (10, 80, 16)
    picked = []
    for batch in made:
        for part in (slice(0, 5), slice(5, 10)):
            starts, (k,) = batch.start[part], set(batch.clip[part].tolist())
            assert set(starts.tolist()) <= set(ranges[k].tolist())
            assert np.ptp(starts) < RULES.span and len(set(starts.tolist())) == 5
            picked.append(k)
        for row, (k, start) in enumerate(zip(batch.clip, batch.start, strict=True)):
            np.testing.assert_array_equal(batch.crops[row], clips[k].crops[start : start + 5])
            np.testing.assert_array_equal(batch.mel[row], clips[k].mel[start])
    assert 0.75 < np.mean(picked) < 0.97  # 290 of 326 windows are the second clip's


def test_the_loss_weighs_right_pairs_moments_and_people_and_leaves_neighbours_out():
    face = jnp.eye(4)[jnp.array([0, 1, 2, 3])]
    voice = jnp.array([[0.8, 0.1, 0.0, 0.3], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.9, 0.0], [0.2, 0.0, 0.3, 0.7]])
    who, start = jnp.array([0, 0, 0, 1]), jnp.array([0, 2, 9, 0])
    cosine = np.clip(np.asarray(face @ voice.T), sync_expert.TINY, 1 - sync_expert.TINY)
    right = -np.log(np.diagonal(cosine)).mean()
    wrong = -np.log(1 - cosine)
    moments = np.mean([wrong[0, 2], wrong[2, 0], wrong[1, 2], wrong[2, 1]])  # 0 and 1 are two frames apart: neither
    people = np.mean([wrong[i, 3] for i in range(3)] + [wrong[3, i] for i in range(3)])
    expected = 0.5 * (right + 0.5 * (moments + people))
    assert float(sync_expert.contrast(face, voice, who, start)) == pytest.approx(expected, rel=1e-5)  # f32
    alone = sync_expert.contrast(face[:3], voice[:3], who[:3], start[:3])
    assert float(alone) == pytest.approx(0.5 * (-np.log(np.diagonal(cosine)[:3]).mean() + moments), rel=1e-5)


def test_ranking_finds_each_others_partner_and_leaves_neighbours_out():
    cosine = np.array([[0.8, 0.7, 0.0, 0.3], [0.9, 0.6, 0.1, 0.1], [0.1, 0.2, 0.9, 0.0], [0.2, 0.0, 0.3, 0.7]])
    who, start = jnp.array([0, 0, 0, 1]), jnp.array([0, 2, 9, 0])  # 0 and 1 are two frames apart
    logits = cosine / sync_expert.TEMPERATURE
    logits[0, 1] = logits[1, 0] = -np.inf
    expected = [np.log(np.exp(rows).sum(1)) - np.diagonal(rows) for rows in (logits, logits.T)]
    found = sync_expert.ranking(jnp.eye(4), jnp.asarray(cosine.T), who, start)
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-6)  # f32: logits of up to 13
    slope = jax.grad(lambda voice: sync_expert.ranking(jnp.eye(4), voice, who, start))(jnp.asarray(cosine.T))
    assert np.isfinite(slope).all() and slope[0, 1] == slope[1, 0] == 0.0


def test_augmented_crops_are_parts_of_the_crops():
    rows, columns = np.mgrid[: 48 + 2 * MARGIN, : 96 + 2 * MARGIN]
    picture = np.stack([rows, columns, 0 * rows + 60], -1).astype(np.uint8)
    crops = np.broadcast_to(picture, (64, 5, *picture.shape))
    made = np.asarray(sync_expert.augment(jax.random.key(0), jnp.asarray(crops)))
    assert made.shape == (64, 5, 48, 96, 3) and made.min() >= 0 and made.max() <= 1
    np.testing.assert_array_equal(made, made[:, :1].repeat(5, 1))  # one window, one change
    slope = made[:, 0, 20, 60, 1] - made[:, 0, 20, 30, 1]
    assert 16 < (slope < 0).sum() < 48  # mirrored, about half of them
    assert len(np.unique(np.round(made[:, 0, 0, 0], 4), axis=0)) > 55


def test_what_is_learned_from_and_what_is_held_out_do_not_touch():
    one = clip("a", 104, 0)  # 100 windows
    learned, held = train_sync.split(one, 0.2)
    assert learned.tolist() == list(range(72)) and held.tolist() == list(range(80, 100))
    assert train_sync.split(one, 0.0)[0].tolist() == list(range(100)) and not len(train_sync.split(one, 0.0)[1])
    with pytest.raises(UserError, match=r"a: is too short to hold out 0\.2"):
        train_sync.split(clip("a", 14, 0), 0.2)


def test_a_datasets_own_split_is_kept():
    """Windows of training frames alone, and of held-out ones alone; batches may reach over what lies between."""
    frames = np.arange(100)
    own = clip("a", 100, 0)._replace(train=(frames < 30) | (frames >= 50), test=(frames >= 36) & (frames < 44))
    learned, held = train_sync.split(own, 0.2, own=True)
    assert learned.tolist() == [*range(26), *range(50, 96)] and held.tolist() == [36, 37, 38, 39]
    batch = next(sync_expert.batches([own], [learned], RULES))
    assert set(batch.start.tolist()) <= set(learned.tolist())
    for wrong, words in ((own._replace(train=None), "a: is a video"), (own._replace(train=frames < 4), "nowhere are")):
        with pytest.raises(UserError, match=words):
            train_sync.split(wrong, 0.2, own=True)


def test_a_clip_too_short_for_an_interval_is_reported_in_json_and_in_a_table(tmp_path):
    rng = np.random.default_rng(0)
    voice = np.eye(30)[rng.permutation(30)]
    row = train_sync.score(lipsync.Embedded(voice[:26], np.arange(26), voice), np.arange(26), 0.5, 5)
    assert (row["pairs"][0], row["single"][0], row["offset_ms"], row["cosine"]) == (1.0, 1.0, 0.0, 1.0)
    assert np.isnan(row["pairs"][1:]).all()
    report = {"config": {"width": 1 / 16}, "shift": 5, "scores": [{"clip": "a", "what": "held-out end", **row}]}
    train_sync._write(tmp_path, random_expert(), report)
    kept = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["scores"][0]
    assert kept["pairs"] == [1.0, None, None]
    for shown in (row, kept):
        assert console.percent(shown["pairs"]) == "100.0 %"
    assert console.percent([0.931, 0.909, 0.95]) == "93.1 % [91, 95]"
    assert train_sync._table(report).row_count == 1


def command(monkeypatch, clips: dict, workdir: Path, *argv: str) -> dict:
    """report.json of the command on these clips."""
    monkeypatch.setattr(train_sync, "open_clip", lambda path, models: clips[str(path)])
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    small = [f"--config.{text}" for text in ("width=0.0625", "groups=2", "windows=8", "span=30", "rate=3e-3")]
    code = cli.exit_code(train_sync.main, [f"--config={CONFIG}", f"--workdir={workdir}", *small, *argv, *clips])
    assert code == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.mark.slow
def test_the_command_learns_what_can_be_learned_and_finds_nothing_where_nothing_is(monkeypatch, tmp_path, capsys):
    """A sixteenth of the network tells shifted windows where pictures follow the sound, and not where they do not."""
    clips = {"told": clip("told", 400, 0), "chance": clip("chance", 400, 1, told=False)}
    report = command(monkeypatch, clips, tmp_path / "run", "--config.steps=100", "--config.test=chance")
    shown = capsys.readouterr().out
    assert "step 100 of 100" in shown and "unseen clip" in shown and "of a single window" in shown
    told, chance = report["scores"]
    assert (told["what"], told["windows"], told["offset_ms"]) == ("held-out end", 79, 0.0)
    # Bounds far below what was seen (0.93 and 0.84): training is chaotic, and rounding differs between processors.
    assert told["pairs"][1] > 0.6 and told["single"][0] > 0.6
    assert (chance["what"], chance["windows"]) == ("unseen clip", 396) and abs(chance["pairs"][0] - 0.5) < 0.12
    assert chance["level"] == told["level"]
    path = str(tmp_path / "run" / "sync.safetensors")
    further = command(
        monkeypatch, clips, tmp_path / "more", "--config.steps=2", "--config.rate=1e-6", f"--config.init={path}"
    )
    assert further["scores"][0]["pairs"][0] == pytest.approx(told["pairs"][0], abs=0.1)  # it went on from there
    judge = judges.load_sync(path, "--config.judges.sync")
    windows = sync_expert.take(clips["told"], np.arange(2))[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert judge.see(jnp.asarray(windows) / 255.0).shape == (2, 32)
