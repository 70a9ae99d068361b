"""Your own video, as we would train it.

    python -m fg3dgs_jax.train --config=configs/portrait.py --config.data=DIR --workdir=RUN
For clips of ten seconds to a minute or two; minutes of speech deserve more steps: --config.schedule_scale=1
It is FG-3DGS as in configs/fg3dgs.py, a fifth of its schedule, with cameras that learn, eyes without a seam and a
budget of Gaussians that go where they are needed: --config.regions.face.capacity=8192 for a faster head.
"""

from pathlib import Path

from fg3dgs_jax import cli
from fg3dgs_jax.training import defaults


def get_config():
    config = cli.load_config(str(Path(__file__).with_name("fg3dgs.py")))
    config.schedule_scale = 0.2
    config.pose.refine = True
    # At the same count of Gaussians the head gains 0.3 dB at 256x256 (two seeds), 0.7 at 512x512 (one), lips as good.
    defaults.relocate(config)
    config.regions.face.capacity = 12_288
    # Eyes go on beneath the face in front of them: where both end at their mask, brows that rise leave a gap around
    # the eyes. Not in a schedule as short as configs/demo.py's: lids and gaze are learned more slowly.
    config.regions.eyes.overlap = 0.016
    return config
