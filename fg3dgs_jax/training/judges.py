"""The pretrained networks that losses ask: LPIPS and the lip-sync expert, each from a file or absent."""

from typing import Any

from ml_collections import ConfigDict

from fg3dgs_jax.data import weights
from fg3dgs_jax.losses import lpips, sync


def load_lpips(path: str, flag: str) -> lpips.Lpips:
    """LPIPS from a file of `convert`. Raises UserError, naming the flag."""
    return weights.build(path, "lpips", lambda arrays, facts: lpips.create(facts.get("net", ""), arrays), flag)


def load_sync(path: str, flag: str) -> sync.Sync:
    """A lip-sync expert from a file of `convert` or `train_sync`. Raises UserError, naming the flag."""
    return weights.build(path, "sync-expert", lambda arrays, facts: sync.create(arrays), flag)


LOADERS = {"lpips": load_lpips, "sync": load_sync}


def load(config: ConfigDict) -> dict[str, Any]:
    """The judges whose weights the config names, by the names of LOADERS; the others are absent."""
    return {
        name: loader(config.judges[name], f"--config.judges.{name}")
        for name, loader in LOADERS.items()
        if config.judges[name]
    }
