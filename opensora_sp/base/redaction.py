"""Removal of secrets from what is shown or stored: logins and queries of addresses, keys, tokens.

A signed address grants access like a password, so only its scheme, host and path are shown. Imports
no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Variables whose values are secret. Short values are placeholders for local servers (EMPTY).
SECRET_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SHORTEST_SECRET = 8

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# In running text an address ends at white space, quotes, brackets or the `;` between references.
# It is searched from the beginning of a word only: from every letter of a word of 100,000 letters
# the search takes 15 s. What is in the word before its first letter is no part of the address.
_ADDRESS_IN_TEXT = re.compile(
    r"(?<![A-Za-z0-9+.-])([0-9+.-]*)([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>;]+)"
)
_MARK = "***"


def is_address(path: str | Path) -> bool:
    """Whether this is an address, `scheme://...`, and not a path."""
    return _ADDRESS.match(str(path)) is not None


def without_secrets(path: str | Path) -> str:
    """A path unchanged, or an address without user, password, query and fragment."""
    if not is_address(path):
        return str(path)
    scheme, _, rest = str(path).partition("://")
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    # A password may hold a '/' or '?' that its writer did not encode as %2F or %3F.
    if "@" in rest:
        place = re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    return f"{scheme}://{place}"


def references_without_secrets(paths: str) -> str:
    """Paths and addresses joined by `;`, each as `without_secrets`."""
    return ";".join(without_secrets(path.strip()) for path in paths.split(";"))


def address_identity(address: str) -> str:
    """An address for storage: without secrets, with a hash that differs where they differ."""
    if without_secrets(address) == address:
        return address
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{without_secrets(address)} sha256:{digest}"


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text for the screen or a log: addresses as `without_secrets`, secret values as ***."""
    for name in SECRET_VARIABLES:
        value = environ.get(name, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _MARK)
    return _ADDRESS_IN_TEXT.sub(_cut, text)


def _cut(found: re.Match[str]) -> str:
    before, address = found.groups()
    ending = re.search(r"[.,:)\]}]*$", address)  # the sentence's, not the address's
    assert ending is not None
    kept = without_secrets(address[: ending.start()])
    return before + kept + ending.group()
