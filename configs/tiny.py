"""Everything that a full run does, in seconds and at no quality: for tests and for trying a change.

python -m fg3dgs_jax.train --config=configs/tiny.py --workdir=/tmp/tiny
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("fg3dgs.py")
_spec = importlib.util.spec_from_file_location("fg3dgs", _path)
fg3dgs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fg3dgs)


def get_config():
    config = fg3dgs.get_config()
    config.synthetic.update(frames=48, size=64)
    config.schedule_scale = 0.001
    for region in config.regions.values():
        region.update(points=200, capacity=512)
        region.grid.update(levels=4, max_resolution=64, log2_table=10)
    config.update(log_every=5, preview_every=30, save_every=20)
    return config
