"""Your own video, as we would train it: both papers together, on a short schedule, with cameras that learn.

    python -m fg3dgs_jax.train --config=configs/portrait.py --config.data=DIR --workdir=RUN
For clips of ten seconds to a minute or two; minutes of speech deserve more steps: --config.schedule_scale=1
TalkingGaussian's face moves the lips, with the inside of the mouth behind it, and FG-3DGS's eyes are a region of their
own: each did better there than the other's on the same frames (README, "Which config").
"""

from pathlib import Path

from fg3dgs_jax import cli


def get_config():
    config, eyes = (
        cli.load_config(str(Path(__file__).with_name(f"{name}.py"))) for name in ("talking_gaussian", "fg3dgs")
    )
    config.layers = ("face", "mouth", "eyes")
    config.regions.face.exclude = ("inner_mouth", "eyes")
    config.regions.eyes = eyes.regions.eyes
    config.schedule_scale = 0.2
    config.pose.refine = True
    config.audio_noise.update(each=0.3, level=0.3)
    return config
