"""FG-3DGS: face, eyes and mouth by motion frequency (arXiv 2602.09736).

Paper, RTX 4090, 2 h a person: PSNR 33.06, LPIPS 0.0252, LMD 2.620, 90 FPS (whole frames of its own portraits).
    python -m fg3dgs_jax.train --config=configs/fg3dgs.py --config.data=DIR --workdir=RUN
Ours, two cores of a shared AMD EPYC: 20 seconds at 256x256, a fifth of the schedule (12,000 steps, 3 minutes if nothing
else runs), poses learned, log-mel bands and the speech embedding in 24 components; 46 held-out frames, three seeds, in
brackets with poses fitted outside the mouth: PSNR head 28.1 (30.3), mouth 28.2 (28.7), eyes 29.8 (31.9) dB, LMD 0.92
(0.94) px, lip opening's r 0.87. Command and intervals: benchmarks/results/papers_256.json.
LPIPS and the alignment stage need weights: --config.judges.lpips=FILE --config.judges.sync=FILE (README).
"""

from fg3dgs_jax.training import defaults

STATIC, MOTION, FUSION, ALIGNMENT = 3_000, 47_000, 5_000, 5_000  # steps; FG's fusion is the last two together


def get_config():
    config = defaults.base()
    config.layers = ("face", "mouth", "eyes")  # FG Eq. 14
    # Departure: twenty seconds of speech are soon learned by heart. With noise the lip opening's r was 0.72 and LMD
    # 1.19; two runs without it gave 0.67 and 1.17, 0.47 and 1.30 (one seed each, small differences are chance).
    config.audio_noise.update(each=0.3, level=0.3)
    # FG does not print where its mouth ends. Lips belong to the face here, as in TG: it hears them in cheeks and chin
    # too. In the mouth's region (configs/ablations.py:fg_lips_in_mouth) they followed speech less well.
    config.regions.face = defaults.region(
        include=("head",), exclude=("inner_mouth", "eyes"), motion="face", points=4_000
    )
    config.regions.mouth = defaults.region(
        include=("inner_mouth",), box="lips", motion="cross_audio", points=2_000, capacity=4_096
    )
    config.regions.eyes = defaults.region(
        include=("eyes",), box="eyes", motion="cross_expression", points=1_500, capacity=2_048
    )
    # Departure: the paper's grid of the mouth ends at 384 cells. 128 was chosen at 256x256, when it held the lips.
    config.regions.face.grid.update(min_resolution=16, max_resolution=256)
    for name in ("mouth", "eyes"):
        config.regions[name].grid.update(min_resolution=64, max_resolution=128)

    # Position: 1.6e-4 -> 1.6e-6 over 45k steps. Motion networks: TG's rates, five times FG's 1e-4 / 1e-5, since this
    # schedule is mostly shortened; with twice TG's LMD was 0.96 px in place of 0.90 (three seeds, lips_256.json).
    motion = {"grids": (5e-3, 5e-4), "audio": (5e-4, 5e-5), "networks": (5e-4, 5e-5)}
    config.schedule = ("static", "motion", "fusion", "alignment")
    config.stages.static = defaults.stage(
        steps=STATIC,
        moving=False,
        rates={"means": (1.6e-4, 1.2e-4), **defaults.SPLAT_RATES},
        weights=defaults.PHOTO_WEIGHTS,
        densify=defaults.densify(start=500, stop=STATIC),
    )
    config.stages.motion = defaults.stage(
        steps=MOTION,
        rates={"means": (1.2e-4, 1.6e-6), **defaults.SPLAT_RATES, **motion},
        # Departure: landmarks lead the lips (training/lips.py); 0.0 leaves it to the papers' losses.
        weights={**defaults.PHOTO_WEIGHTS, **defaults.DELTA_WEIGHTS, "landmarks": 0.3},
        densify=defaults.densify(start=0, stop=MOTION - 5_000),
    )
    config.stages.fusion = defaults.stage(
        steps=FUSION,
        rates={"sh": (2.5e-3, 2.5e-4), "opacities": (5e-2, 5e-3)},
        weights={"frame_l1": 1.0, "frame_dssim": 0.2, "frame_lpips": 0.5},  # FG Eq. 15
    )
    # FG Eq. 16: only the mouth's network and the colours learn; the face's too, which moves the lips. Without sync
    # weights fusion runs for these steps too.
    config.stages.alignment = defaults.stage(
        steps=ALIGNMENT,
        frames=5,
        rates={"sh": (2.5e-4, 2.5e-5), "grids": (5e-4, 5e-5), "audio": (1e-4, 1e-5), "networks": (1e-4, 1e-5)},
        only=dict.fromkeys(("grids", "audio", "networks"), ("face", "mouth")),
        weights={"frame_l1": 1.0, "frame_dssim": 0.2, "frame_lpips": 0.5, "sync": 0.03},
    )
    return config
