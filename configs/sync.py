"""A lip-sync expert of your own, for the alignment stage and the sync scores, without anybody's non-commercial weights.

    python -m fg3dgs_jax.train_sync --config=configs/sync.py CLIP [CLIP ...] --workdir=RUN
The network of Wav2Lip's discriminator at a quarter of its width. CLIPs are dataset folders or videos at 25 FPS whose
sound is in sync; the more people and minutes, the better. How well it then tells
sync from shift is in report.json; no figure is promised here.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init": "",  # an expert to go on from: a file of train_sync, or of convert; its width is kept
            "width": 0.25,  # of the published network's channels; 1.0 is that network
            "steps": 2000,
            "groups": 2,  # stretches of clips in a batch
            "windows": 16,  # windows in a stretch, each compared with the sounds of all others
            "span": 40,  # frames that a stretch is long
            "rate": 2e-3,
            "decay": 1e-2,
            "seed": 0,
            "held_share": 0.2,  # the end of each clip, held out from training and scored afterwards
            "own_split": False,  # True: hold out what a dataset folder itself holds out, in place of its end
            "test": "",  # one of the clips: scored as a whole, not trained on
            "shift": 5,  # frames by which wrong sounds are moved when scoring
            "models": "",  # folder with face_landmarker.task, for videos
        }
    )
