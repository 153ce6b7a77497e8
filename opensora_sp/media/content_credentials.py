"""C2PA manifests (Content Credentials): a signed statement in a file that a model made it.

c2pa-python writes them. It is an extra of the package, and is imported inside the functions.
Nothing is fetched: no time stamp of an authority, and no answer of a certificate's issuer.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import SigningError

# IPTC's word for content that a trained model made. C2PA takes its words from there.
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MANIFEST = {
    "claim_generator_info": [{"name": "opensora_sp"}],  # the settings in the file have its version
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]},
        }
    ],
}
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}
_BY_CURVE = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True)
class Signing:
    """What a manifest is signed with.

    certificate: PEM, the signer's first, then those above it. key: its private key, PEM.
    """

    certificate: Path
    key: Path


def check_signing(signing: Signing) -> None:
    """Raise SigningError where no manifest could be made: a tiny picture is signed, in memory."""
    for name in ("c2pa", "cryptography"):
        if importlib.util.find_spec(name) is None:
            raise SigningError(
                "--label-certificate needs the package c2pa-python: pip install 'opensora_sp[c2pa]'"
            )
    times = tuple(_read(f, p)[0] for f, p in _files(signing))
    _try_once(signing, times)


@cache
def _try_once(signing: Signing, times: tuple[int, ...]) -> None:
    """The trial of these files as they are now; a server asks for each request."""
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    picture.seek(0)
    _sign(signing, "image/png", picture, io.BytesIO())


def sign(path: Path, kind: str, signing: Signing) -> None:
    """Put a manifest into a file. kind: its media type.

    Raises SigningError, or UserError where it cannot be written; the file then stays.
    """
    with atomic_output(path) as signed, path.open("rb") as source, signed.open("w+b") as target:
        _sign(signing, kind, source, target)


def _sign(signing: Signing, kind: str, source: Any, target: Any) -> None:
    import c2pa

    certificate, given = (_read(flag, path)[1] for flag, path in _files(signing))
    algorithm, key = _own_key(signing, certificate, given)
    try:
        info = c2pa.C2paSignerInfo(getattr(c2pa.C2paSigningAlg, algorithm), certificate, key, None)
        context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(_MANIFEST, context) as builder:
            builder.sign(signer, kind, source, target)
    except c2pa.C2paError as error:
        why = " ".join(str(error).split())
        raise SigningError(
            f"--label-certificate {signing.certificate} does not sign a C2PA manifest: {why}"
        ) from error


def _own_key(signing: Signing, certificate: bytes, key: bytes) -> tuple[str, bytes]:
    """C2PA's name for how a key signs, and the key as PKCS #8, the one form that c2pa reads.

    Raises SigningError where it is not the certificate's.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.x509 import load_pem_x509_certificates

    try:
        first = load_pem_x509_certificates(certificate)[0].public_key()
    except (ValueError, IndexError) as error:
        raise SigningError(
            f"--label-certificate {signing.certificate} holds no certificate in PEM"
        ) from error
    try:
        own = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise SigningError(
            f"--label-key {signing.key} holds no private key in PEM that is not encrypted"
        ) from error
    if own.public_key() != first:
        raise SigningError(
            f"--label-key {signing.key} is not the key of the first certificate of "
            f"{signing.certificate}"
        )
    algorithm = None
    if isinstance(own, ec.EllipticCurvePrivateKey):
        algorithm = _BY_CURVE.get(own.curve.name)
    elif isinstance(own, rsa.RSAPrivateKey):
        algorithm = "PS256"
    elif isinstance(own, ed25519.Ed25519PrivateKey):
        algorithm = "ED25519"
    if algorithm is None:
        raise SigningError(
            f"--label-key {signing.key} is a key that C2PA does not sign with: make one of P-256, "
            "P-384, P-521, Ed25519 or RSA"
        )
    pkcs8 = own.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return algorithm, pkcs8


def _files(signing: Signing) -> tuple[tuple[str, Path], tuple[str, Path]]:
    return ("--label-certificate", signing.certificate), ("--label-key", signing.key)


def _read(flag: str, path: Path) -> tuple[int, bytes]:
    """When a file was changed, and what it holds. Raises SigningError."""
    try:
        return path.stat().st_mtime_ns, path.read_bytes()
    except OSError as error:
        raise SigningError(f"{flag} {path}: {error.strerror}") from error
