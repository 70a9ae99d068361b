"""Every field of a config, its default and its meaning. A file in `configs/` starts from here and says what differs.

Any field is set on the command line: `--config.stages.motion.steps=20000 --config.regions.face.capacity=8192`.
Steps are those of a full run; `schedule_scale` shortens all of them in proportion.
"""

from ml_collections import ConfigDict, config_dict

# What both papers' recipes agree on: rates of a Gaussian but its position's, losses of a region, deformations' weights.
SPLAT_RATES = {"quats": (1e-3, 1e-3), "log_scales": (3e-3, 3e-3), "opacities": (5e-2, 5e-2), "sh": (2.5e-3, 2.5e-3)}
PHOTO_WEIGHTS = {"l1": 1.0, "dssim": 0.2, "alpha": 1e-3}
DELTA_WEIGHTS = {"delta_means": 1e-5, "delta_quats": 1e-5, "delta_log_scales": 1e-5}


def region(**fields) -> ConfigDict:
    """A layer of the head."""
    return ConfigDict(
        {
            "include": (),  # labels that belong to the region: head, hair, lips, inner_mouth, eyes, torso
            "exclude": (),  # labels that do not, even where one of the others is set
            "box": "",  # "lips" or "eyes": only pixels inside the mask or outside these boxes are judged
            # How far the region goes on beneath those in front of it, of the frame's height: 0.0, and where both end a
            # seam shows in poses that the clip hardly has.
            "overlap": 0.0,
            "motion": "face",  # motion network: face, cross_audio, cross_expression, mouth_mlp or eyes_mlp
            # What the network changes of a Gaussian: means, quats, log_scales, opacities, colors. (): what is usual,
            # the first three in the face and the means alone elsewhere (FG Eq. 8, 12).
            "predicts": (),
            "points": 2_000,  # Gaussians at the start
            "capacity": 16_384,  # Gaussians at most
            "grad_threshold": 2e-4,  # mean screen gradient (NDC) above which a Gaussian is cloned or split
            "grid": {
                "levels": 12,
                "min_resolution": 16.0,
                "max_resolution": 256.0,
                "features": 1,
                "log2_table": 17,
                "bound": 1.5,  # half-edge of the encoded cube, in head radii
            },
            **fields,
        }
    )


def densify(**fields) -> ConfigDict:
    """Growing and shrinking of the pools, in steps of the stage; `every` 0 turns it off."""
    return ConfigDict(
        {
            # "classic": clone, split and prune by thresholds (3DGS). "relocation": faint Gaussians move to opaque ones,
            # and pools grow to their capacity, which is the budget (3DGS as MCMC); wants the weights opacity and scale.
            "kind": "classic",
            "start": 500,
            "stop": 45_000,
            "every": 100,
            "shortest": 50,  # a shortened schedule still waits this long between two rounds
            "percent_dense": 0.02,
            "min_opacity": (0.05, 0.05),
            "max_radius": 0.0,
            "max_scale": 0.5,
            "reset_every": 0,  # steps from one lowering of all opacities to 0.01 to the next (3DGS); 0: never
            "growth": 0.05,  # relocation, from here on: the share by which a pool grows a round
            "faint": 0.005,  # opacity below which a Gaussian is put elsewhere
            "noise": 5e5,  # of the means of faint ones, times their learning rate
            **fields,
        }
    )


def relocate(config: ConfigDict) -> None:
    """Densification by relocation where a config densifies: the pools' capacities are the budget, and are filled.

    The paper's weights (3DGS as MCMC) are 0.01 each in scenes some units wide; a head is 0.1 units wide, hence scale's.
    """
    for fields in config.stages.values():
        if fields.densify.every:
            fields.densify.kind = "relocation"
            fields.weights.update(opacity=0.01, scale=0.1)


def stage(**fields) -> ConfigDict:
    """A stretch of training at constant rules."""
    return ConfigDict(
        {
            "steps": 0,
            "moving": True,  # False: the head stands still, motion networks wait
            "rates": {},  # group -> (learning rate at the first step, at the last); a group left out is frozen
            "only": {},  # group -> the regions in which it learns, such as ("mouth",); a group left out learns in all
            "frames": 1,  # consecutive frames that a step renders; 5 for what a lip-sync expert judges
            "weights": {"l1": 1.0, "dssim": 0.2},  # loss term -> weight, see losses/terms.py
            "densify": densify(every=0),
            "curricula": {},  # incremental sampling: name -> fields of data.sampling.Curriculum, steps of the stage
            **fields,
        }
    )


def groups() -> dict:
    """Groups of parameters: a regex for their paths, exactly one of which must match each.

    `per_extent` rates are multiplied by the head's radius.
    """
    return {
        "means": {"pattern": r".*/gaussians/means", "decay": 0.0, "per_extent": True},
        "quats": {"pattern": r".*/gaussians/quats", "decay": 0.0, "per_extent": False},
        "log_scales": {"pattern": r".*/gaussians/log_scales", "decay": 0.0, "per_extent": False},
        "opacities": {"pattern": r".*/gaussians/logit_opacities", "decay": 0.0, "per_extent": False},
        "sh": {"pattern": r".*/gaussians/sh", "decay": 0.0, "per_extent": False},
        "grids": {"pattern": r".*/motion/grid/.*", "decay": 1e-2, "per_extent": False},
        "audio_basis": {"pattern": r".*/motion/audio/basis/.*", "decay": 0.0, "per_extent": False},
        "audio": {"pattern": r".*/motion/audio/(?!basis/).*", "decay": 1e-4, "per_extent": False},
        "networks": {"pattern": r".*/motion/(?!grid/|audio/).*", "decay": 0.0, "per_extent": False},
    }


def base() -> ConfigDict:
    """What all configs share; `layers`, `regions`, `schedule` and `stages` are left to them."""
    return ConfigDict(
        {
            "data": "",  # dataset folder: from `preprocess`, or in the AD-NeRF / ER-NeRF / TalkingGaussian layout
            "synthetic": {"frames": 0, "size": 192, "seed": 0},  # frames > 0 and no `data`: make the procedural clip
            "audio_features": config_dict.placeholder(str),  # another front end than the folder's own
            # Principal components of an audio window that networks see in its place; 0: they see the window.
            "audio_components": 0,
            # Noise on the audio features while their networks learn, in standard deviations of what the networks see:
            # on each value; and of the features, on all of a frame's values together (loudness, for log-mel bands).
            "audio_noise": {"each": 0.0, "level": 0.0},
            # Per-person ranges of expression coefficients, from training frames alone, and smoothing over time.
            "expression": {
                "normalise": False,  # also where the dataset has done so over the whole clip
                "smooth": 0.0,  # frames, deviation of a Gaussian; lids and gaze stay sharp
            },
            # Corrections of the measured poses, a rigid motion per frame, and of the focal length. Rates, at a stage's
            # first step and its last: radians and head radii a visit of a frame, the focal length's logarithm a step.
            "pose": {
                "refine": False,
                "stages": ("motion",),  # in which they learn; later ones keep them
                "rate": (8e-3, 4e-4),
                "focal_rate": (5e-5, 5e-6),  # (0.0, 0.0): the focal length stays
                "smooth": 5.0,  # weight of the corrected poses' squared second differences
                "near": 0.5,  # weight of the squared corrections: what no picture tells stays as measured
            },
            "seed": 0,
            "schedule_scale": 1.0,
            "layers": (),  # names of the regions, front to back
            "regions": {},
            "schedule": (),  # names of the stages, in order
            "stages": {},
            "sh_degree": 2,
            "sh_every": 1_000,  # steps per additional degree
            "groups": groups(),
            # Pretrained networks, files of `convert` or `train_sync`; without one the terms that ask it are left out.
            "judges": {"lpips": "", "sync": ""},
            "sh_rest": 0.05,  # SH above degree 0 learn this much slower
            "rasterizer": {
                "backend": "auto",
                "max_pairs": 0,  # tile-Gaussian pairs of a layer at most; 0: no limit
                "deterministic": False,  # True: on CUDA too its gradients are equal from run to run, bit for bit
            },
            "log_every": 20,  # steps between two looks at the metrics
            "preview_every": 500,  # steps between two preview pictures
            "save_every": 1_000,  # steps between two checkpoints
            "keep": 2,  # checkpoints kept
            "evaluate": True,  # score the held-out frames and write result.mp4 after training
            "models": "",  # folder with face_landmarker.task, for LMD and jitter
        }
    )
