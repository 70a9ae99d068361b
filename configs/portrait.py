"""Your own video, as we would train it.

    python -m fg3dgs_jax.train --config=configs/portrait.py --config.data=DIR --workdir=RUN
For clips of ten seconds to a minute or two; minutes of speech deserve more steps: --config.schedule_scale=1
It is FG-3DGS as in configs/fg3dgs.py, a fifth of its schedule, with cameras that learn.
"""

from pathlib import Path

from fg3dgs_jax import cli


def get_config():
    config = cli.load_config(str(Path(__file__).with_name("fg3dgs.py")))
    config.schedule_scale = 0.2
    config.pose.refine = True
    return config
