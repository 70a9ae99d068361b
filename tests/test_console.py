"""Tables that people read: every number in its row, gaps left empty, reasons said once."""

import io

from rich.console import Console

from fg3dgs_jax.inference import console

NAN = float("nan")


def text(table):
    screen = Console(width=140, file=io.StringIO())
    screen.print(table)
    return {
        line.split("│")[1].strip(): line for line in screen.file.getvalue().splitlines() if line.count("│") > 2
    }, screen


def test_scores_with_intervals_and_reasons():
    report = {
        "frames": [{}] * 7,
        "summary": {"psnr": 30.126, "ssim": 0.9, "lip_opening_r": NAN, "seconds_per_frame": 0.01234},
        "intervals": {"psnr": [29.0, 31.0], "ssim": [NAN, NAN]},
        "unavailable": {"lmd": "no model", "jitter": "no model"},
    }
    rows, screen = text(console.score_table(report))
    assert "30.13" in rows["PSNR frame, dB"] and "29.00 to 31.00" in rows["PSNR frame, dB"]
    assert "0.900" in rows["SSIM frame"] and "nan" not in screen.file.getvalue()
    assert "0.0123" in rows["seconds per frame, median"]
    assert "unavailable" in rows["LMD, px"] and screen.file.getvalue().count("no model") == 1
    assert "7 held-out frames" in screen.file.getvalue()


def test_probes_in_per_cent():
    report = {
        "conditions": {"right": {"lmd": 1.0, "eye_error": 3.0}, "random audio": {"lmd": 1.25, "eye_error": NAN}},
        "reductions": {
            "random audio": {"metric": "lmd", "relative": [0.2, 0.1, 0.3]},
            "wrong audio, mean": {"metric": "mouth_error", "relative": [0.0, NAN, NAN]},
        },
    }
    rows, screen = text(console.probe_table(report))
    assert "20.0 % of lmd" in rows["random audio"] and "10.0 to 30.0" in rows["random audio"]
    assert "1.00" in rows["right"] and "%" not in rows["right"]
    assert "0.0 % of mouth error" in rows["wrong audio, mean"] and "nan" not in screen.file.getvalue()


def test_progress_passes_everything_through_and_speaks_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    assert list(console.track(range(3), "frames")) == [0, 1, 2]
    assert "frames: 2 of 3" in capsys.readouterr().err
