"""A procedural talking head from nothing: the clip is made, trained, scored and spoken in minutes on two CPU cores.

    python -m fg3dgs_jax.train --config=configs/demo.py
The same three regions and stages as configs/fg3dgs.py, on a small picture and a short schedule.
"""

from pathlib import Path

from fg3dgs_jax import cli


def get_config():
    config = cli.load_config(str(Path(__file__).with_name("fg3dgs.py")))
    config.synthetic.update(frames=250, size=160)
    config.schedule_scale = 0.07
    config.stages.motion.rates.networks = (3e-3, 3e-4)  # a short schedule must move faster
    config.regions.face.update(points=3_000, capacity=6_144)
    config.regions.face.grid.max_resolution = 128  # as fine as the picture
    config.regions.mouth.update(points=1_000, capacity=2_048)
    config.regions.eyes.update(points=1_000, capacity=2_048)
    config.update(preview_every=500, save_every=1_000)
    return config
