"""Everything that a full run does, in seconds and at no quality: for tests and for trying a change.

python -m fg3dgs_jax.train --config=configs/tiny.py --workdir=/tmp/tiny
"""

from pathlib import Path

from fg3dgs_jax import cli


def get_config():
    config = cli.load_config(str(Path(__file__).with_name("fg3dgs.py")))
    config.synthetic.update(frames=48, size=64)
    config.schedule_scale = 0.001
    for region in config.regions.values():
        region.update(points=200, capacity=512)
        region.grid.update(levels=4, max_resolution=64, log2_table=10)
    config.update(log_every=5, preview_every=30, save_every=20)
    return config
