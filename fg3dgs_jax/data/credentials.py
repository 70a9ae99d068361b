"""Content credentials (C2PA): a signed statement inside a finished file that a trained model made it.

They need the c2pa-python package (extra `credentials`), a certificate that C2PA validators trust, and its private key.
The network is not asked: the signature carries no authority's time stamp. Copying a video's streams into another file
drops the statement.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fg3dgs_jax.data import writing
from fg3dgs_jax.errors import UserError

KINDS = {".mp4": "video/mp4", ".mov": "video/quicktime"}  # that can hold credentials, of those that are written
ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")


class Credentials(NamedTuple):
    """Who signs."""

    certificates: bytes  # PEM, the signer's own first
    key: bytes  # PEM, PKCS #8
    algorithm: str


def load(certificate: Path, key: Path) -> Credentials:
    """What signs with these files, tried on a tiny video. Raises UserError: not installed, no such file, no pair."""
    _c2pa()
    contents = []
    for flag, path in (("--certificate", certificate), ("--key", key)):
        if not path.is_file():
            raise UserError(f"{flag} {path}: no such file; give a PEM file")
        contents.append(path.read_bytes())
    reason: Exception | None = None
    with tempfile.TemporaryDirectory(prefix="fg3dgs_jax_") as folder:
        trial = Path(folder) / "trial.mp4"
        writing.write_video(trial, iter([np.zeros((16, 16, 3), np.uint8)] * 2), 25)
        for algorithm in ALGORITHMS:  # the key's kind decides which one fits
            found = Credentials(*contents, algorithm)
            try:
                sign(trial, found)
                return found
            except UserError as error:
                # What a key of another kind is told says less than what the fitting one is.
                reason = error if reason is None or "key" in str(reason) else reason
    raise UserError(f"--certificate {certificate}: cannot sign with --key {key} ({reason}); give a C2PA signing pair")


def signer(credentials: Credentials) -> Callable[[Path], None]:
    """`sign` by these credentials, for `writing.write_video`."""
    return lambda path: sign(path, credentials)


def sign(path: Path, credentials: Credentials) -> None:
    """Puts credentials into a finished .mp4 or .mov, in place. Raises UserError with the reason."""
    c2pa = _c2pa()
    given = c2pa.C2paSignerInfo(credentials.algorithm, credentials.certificates, credentials.key, None)
    signed = path.with_name(f"{path.stem}.signed{path.suffix}")
    try:
        with (
            c2pa.Signer.from_info(given) as who,
            c2pa.Builder.from_json(_statement(path)) as builder,
            open(path, "rb") as source,
            open(signed, "w+b") as target,
        ):
            builder.sign(who, KINDS[path.suffix.lower()], source, target)
        signed.replace(path)
    except (c2pa.C2paError, ValueError, TypeError) as error:
        raise UserError(str(error).strip().splitlines()[0] if str(error).strip() else "no reason given") from error
    finally:
        signed.unlink(missing_ok=True)


def _statement(path: Path) -> dict:
    made = {"action": "c2pa.created", "digitalSourceType": writing.SOURCE_TYPE, "description": writing.SYNTHETIC_MARK}
    return {
        "claim_generator_info": [{"name": "fg3dgs_jax"}],
        "format": KINDS[path.suffix.lower()],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}],
    }


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise UserError("--certificate needs c2pa-python: pip install 'fg3dgs_jax[credentials]'") from error
    return c2pa
