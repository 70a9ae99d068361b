"""Content credentials: signed by a certificate of our own making, and what is refused.

c2pa itself is asked where it is installed; everywhere, a stand-in for it shows when and on what it is called.
"""

import datetime
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fg3dgs_jax.data import credentials, video, writing
from fg3dgs_jax.errors import UserError

REASON = "needs c2pa-python and cryptography: pip install 'fg3dgs_jax[parity]'"


def frames():
    return (np.full((48, 64, 3), 9 * k, np.uint8) for k in range(10))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """PEM files of a chain (signer, root) and of the signer's key, both new."""
    x509 = pytest.importorskip("cryptography.x509", reason=REASON)
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "signer")}
    named = {
        name: x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "A test"),
                         x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys
    }  # fmt: skip
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False
    )  # fmt: skip

    def certificate(name: str) -> bytes:
        root = name == "root"
        may = x509.KeyUsage(digital_signature=not root, key_cert_sign=root, crl_sign=root, **usage)
        made = (
            x509.CertificateBuilder(named["root"], named[name], keys[name].public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
            .add_extension(may, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[name].public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["root"].public_key()), critical=False
            )
        )
        if not root:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            made = made.add_extension(purpose, critical=False)
        return made.sign(keys["root"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    folder = tmp_path_factory.mktemp("pair")
    (folder / "chain.pem").write_bytes(certificate("signer") + certificate("root"))
    for name, key in keys.items():
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.pem").write_bytes(pem)
    return folder


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_signed_video_says_that_it_is_synthetic_and_a_change_is_noticed(pair, tmp_path, suffix):
    c2pa = pytest.importorskip("c2pa", reason=REASON)
    found = credentials.load(pair / "chain.pem", pair / "signer.pem")
    assert found.algorithm == "es256"
    path = tmp_path / f"talk{suffix}"
    writing.write_video(path, frames(), 25, np.zeros(6400, np.float32), finish=credentials.signer(found))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert video.probe(path).num_frames == 10
    with c2pa.Reader(str(path)) as reader:
        assert reader.get_validation_state() == "Valid"  # though nobody trusts this root
        told = reader.get_active_manifest()
    assert told["signature_info"]["common_name"] == "signer"
    (action,) = next(a["data"]["actions"] for a in told["assertions"] if a["label"] == "c2pa.actions.v2")
    assert action["digitalSourceType"] == writing.SOURCE_TYPE and action["action"] == "c2pa.created"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"mdat") + 100] ^= 1
    path.write_bytes(data)
    with c2pa.Reader(str(path)) as reader:
        assert reader.get_validation_state() == "Invalid"


def test_a_key_of_another_certificate_is_refused(pair, tmp_path):
    pytest.importorskip("c2pa", reason=REASON)
    with pytest.raises(UserError, match=r"--certificate .*chain\.pem: cannot sign with --key .*root\.pem \(.+\); give"):
        credentials.load(pair / "chain.pem", pair / "root.pem")


class Stand:
    """Stands for c2pa: files end in the algorithm that signed them; only es384 can."""

    C2paError = RuntimeError
    C2paSignerInfo = staticmethod(lambda algorithm, *rest: SimpleNamespace(algorithm=algorithm, rest=rest))

    def __init__(self, given):
        self.given = given

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    Signer = SimpleNamespace(from_info=lambda given: Stand(given))
    Builder = SimpleNamespace(from_json=lambda statement: Stand(statement))

    def sign(self, who, kind, source, target):
        assert kind == self.given["format"] and who.given.rest == (b"chain", b"key", None)
        if who.given.algorithm != "es384":
            raise Stand.C2paError("Signature: invalid private key")
        target.write(source.read() + b"es384")


def test_files_are_signed_before_they_get_their_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", Stand)
    (tmp_path / "chain.pem").write_bytes(b"chain")
    (tmp_path / "key.pem").write_bytes(b"key")
    found = credentials.load(tmp_path / "chain.pem", tmp_path / "key.pem")
    assert found == (b"chain", b"key", "es384")
    writing.write_video(tmp_path / "a.mp4", frames(), 25, finish=credentials.signer(found))
    assert (tmp_path / "a.mp4").read_bytes().endswith(b"es384")
    bad = credentials.signer(found._replace(algorithm="es256"))
    with pytest.raises(UserError, match="invalid private key"):
        writing.write_video(tmp_path / "b.mp4", frames(), 25, finish=bad)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "chain.pem", "key.pem"]
    (tmp_path / "key.pem").unlink()
    with pytest.raises(UserError, match=r"--key .*key\.pem: no such file"):
        credentials.load(tmp_path / "chain.pem", tmp_path / "key.pem")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UserError, match=r"pip install 'fg3dgs_jax\[credentials\]'"):
        credentials.load(tmp_path / "chain.pem", tmp_path / "key.pem")
