"""The rows of both papers' ablation tables, as changes to configs/fg3dgs.py and configs/talking_gaussian.py; and ours.

    python -m fg3dgs_jax.train --config=configs/ablations.py:fg_no_fad --config.data=DIR --workdir=RUN
    python benchmarks/ablations.py --data DIR --runs RUNS --budget-minutes 10     trains the set and prints the tables
The names are those of ROWS below. Where a paper leaves a row open, what we read it as is said there. What the rows
reached here, and against the full models: benchmarks/results/rows_256.md.
"""

from pathlib import Path

from fg3dgs_jax import cli
from fg3dgs_jax.training import defaults

DEFORMATION = ("means", "quats", "log_scales")  # TG Eq. 4
APPEARANCE = ("opacities", "colors")


def _load(name: str):
    return cli.load_config(str(Path(__file__).with_name(f"{name}.py")))


def _no_sampling(config) -> None:
    """TG without Eq. 6: every epoch shows every frame once."""
    for stage in config.stages.values():
        stage.curricula = defaults.stage().curricula


def _no_decomposition(config) -> None:
    """TG without its second branch: the face's network and Gaussians also make the inside of the mouth."""
    config.layers = ("face",)
    config.regions.face.exclude = ()
    _no_sampling(config)


def _predicts(config, names: dict[str, tuple[str, ...]]) -> None:
    """Regions whose networks change other things than usual; each change is penalised like a deformation."""
    for region, fields in names.items():
        config.regions[region].predicts = fields
    config.stages.motion.weights.update(delta_opacities=1e-5, delta_colors=1e-5)


def _no_landmarks(config) -> None:
    """The papers' losses alone: no landmark leads the lips (training/lips.py)."""
    config.stages.motion.weights.landmarks = 0.0


def _appearance(config) -> None:
    """TG's rival: Gaussians stay where they are, and their opacity and colour change with the condition.

    The paper does not say how colour changes. Here: the constant coefficient of the harmonics, so that the change is
    the same from everywhere.
    """
    _predicts(config, dict.fromkeys(config.layers, APPEARANCE))
    _no_sampling(config)
    _no_landmarks(config)  # nothing that could be led moves


def _appearance_whole(config) -> None:
    """The same from one branch: the table's first row."""
    _no_decomposition(config)
    _appearance(config)


def _alpha(config) -> None:
    """TG Table 5: opacity changes beside the deformation; the mouth's deformation stays that of means."""
    _predicts(config, {"face": (*DEFORMATION, "opacities"), "mouth": ("means", "opacities")})


def _alpha_rgb(config) -> None:
    """TG Table 5: opacity and colour change beside the deformation."""
    _predicts(config, {"face": (*DEFORMATION, *APPEARANCE), "mouth": ("means", *APPEARANCE)})


def _no_fad(config) -> None:
    """FG without frequency-aware disentanglement: two regions, the eyes belong to the face."""
    config.layers = ("face", "mouth")
    config.regions.face.exclude = ("inner_mouth",)


def _no_fam(config) -> None:
    """FG without frequency-aware modelling: TG's perceptron in place of gated cross-modal attention."""
    config.regions.mouth.motion, config.regions.eyes.motion = "mouth_mlp", "eyes_mlp"


def _no_hrpa(config) -> None:
    """FG without Eq. 16: fusion runs for alignment's steps too. Without sync weights the full config is the same."""
    config.schedule = tuple(name for name in config.schedule if name != "alignment")
    config.stages.fusion.steps += config.stages.alignment.steps


def _lips_in_mouth(config) -> None:
    """FG's other reading: the mouth is lips and what is between them, moved by one network (HRPA moves that alone)."""
    config.regions.face.exclude = ("lips", "inner_mouth", "eyes")
    config.regions.mouth.include = ("lips", "inner_mouth")
    config.stages.alignment.only = dict.fromkeys(config.stages.alignment.only, ("mouth",))


def _high_all(config) -> None:
    """FG's remark on Eq. 12: eyes and mouth also turn and scale."""
    config.regions.mouth.predicts = config.regions.eyes.predicts = DEFORMATION


def _full(config) -> None:
    """The config as it is."""


# name -> (config, what changes, the row in the table)
ROWS = {
    "tg": ("talking_gaussian", _full, "TalkingGaussian, full"),
    "tg_no_sampling": ("talking_gaussian", _no_sampling, "without incremental sampling"),
    "tg_deformation_whole": ("talking_gaussian", _no_decomposition, "without decomposition and sampling"),
    "tg_appearance": ("talking_gaussian", _appearance, "appearance, with decomposition, without sampling"),
    "tg_appearance_whole": ("talking_gaussian", _appearance_whole, "appearance, without either"),
    "tg_alpha": ("talking_gaussian", _alpha, "deformation + alpha"),
    "tg_alpha_rgb": ("talking_gaussian", _alpha_rgb, "deformation + alpha + RGB"),
    "tg_no_landmarks": ("talking_gaussian", _no_landmarks, "lips not led by landmarks"),
    "fg": ("fg3dgs", _full, "FG-3DGS, full"),
    "fg_no_fad": ("fg3dgs", _no_fad, "without FAD (eyes in the face)"),
    "fg_no_fam": ("fg3dgs", _no_fam, "without FAM (perceptrons)"),
    "fg_no_hrpa": ("fg3dgs", _no_hrpa, "without HRPA (no L_lip)"),
    "fg_high_all": ("fg3dgs", _high_all, "eyes and mouth: means, scales, rotations"),
    "fg_lips_in_mouth": ("fg3dgs", _lips_in_mouth, "lips in the mouth's region"),
    "fg_relocation": ("fg3dgs", defaults.relocate, "densification by relocation"),
    "fg_no_landmarks": ("fg3dgs", _no_landmarks, "lips not led by landmarks"),
}


def get_config(name: str = "fg"):
    if name not in ROWS:
        raise ValueError(f"no ablation {name!r}; there are {', '.join(ROWS)}")
    base, change, _ = ROWS[name]
    config = _load(base)
    change(config)
    return config
