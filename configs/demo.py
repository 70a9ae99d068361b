"""A procedural talking head from nothing: the clip is made, trained, scored and spoken in minutes on two CPU cores.

    python -m fg3dgs_jax.train --config=configs/demo.py
The same three regions and stages as configs/fg3dgs.py, on a small picture and a short schedule.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("fg3dgs.py")
_spec = importlib.util.spec_from_file_location("fg3dgs", _path)
fg3dgs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fg3dgs)


def get_config():
    config = fg3dgs.get_config()
    config.synthetic.update(frames=160, size=160)
    config.schedule_scale = 0.03
    config.regions.face.update(points=3_000, capacity=6_144)
    config.regions.mouth.update(points=1_000, capacity=2_048)
    config.regions.eyes.update(points=1_000, capacity=2_048)
    config.update(preview_every=300, save_every=500)
    return config
