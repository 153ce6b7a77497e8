"""The endpoint of the language model that refines prompts, from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import read_launch
from opensora_sp.base.value_types import shown

DEFAULT_BASE_URL = "https://api.openai.com/v1"
TIMEOUT_S = 60.0  # of one try, from the host's lookup to the last byte of the answer
TRIES = 2
BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 20.0  # a server may ask for more
MAX_ANSWER_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Endpoint:
    """A chat completion endpoint: base address, model, key, timeout and backoff in seconds."""

    base_url: str
    model: str
    key: str = field(repr=False)
    timeout_s: float = TIMEOUT_S
    backoff_s: float = BACKOFF_S


def model_asked(model: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The language model that is asked: `model`, else OPENAI_MODEL, else None."""
    return model or environ.get("OPENAI_MODEL", "").strip() or None


def endpoint_from_environment(
    model: str | None = None, environ: Mapping[str, str] = os.environ
) -> Endpoint:
    """The endpoint that the environment describes; `model` wins over OPENAI_MODEL.

    Raises UserError naming the variable that is missing or cannot be used, never the key.
    """
    key = environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "--llm-refine needs OPENAI_API_KEY in the environment (for a local server any word): "
            "set it, or leave --llm-refine out"
        )
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            "OPENAI_API_KEY in the environment holds a space, a line break or a character that is "
            "not ASCII, which no key does: set it again"
        )
    base_url = environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    _check_base_url(base_url)
    model = model_asked(model, environ)
    if model is None:
        # There is no default, because services withdraw their models.
        raise UserError(
            "--llm-refine needs the name of a language model that OPENAI_BASE_URL serves: give "
            "--prompt-generator MODEL, such as --prompt-generator gpt-5-mini, or set OPENAI_MODEL"
        )
    return Endpoint(base_url.rstrip("/"), model, key)


def check_endpoint(model: str | None = None) -> None:
    """Check the environment on rank 0, as `endpoint_from_environment` does.

    Only rank 0 asks the endpoint. Other nodes may not have the variables.
    """
    if read_launch().rank == 0:
        endpoint_from_environment(model)


def _check_base_url(address: str) -> None:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        parts, usable = urlsplit(""), False
    # A key may be anywhere in the address, so a message shows at most its host.
    if "@" in address:
        raise UserError(
            "OPENAI_BASE_URL in the environment holds an '@': leave user and password out"
        )
    if not usable or parts.query or parts.fragment or not re.fullmatch("[!-~]+", address):
        raise UserError(
            f"OPENAI_BASE_URL{_host_of(address)} in the environment is not an http(s) address "
            f"without a query, such as {DEFAULT_BASE_URL}"
        )


def _host_of(address: str) -> str:
    """Scheme and host of an address as "=http://host:1 (...)"; empty where it has no host."""
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@\\]*)[/?#]?.*", address, re.DOTALL)
    return f"={shown(found.group(1))} (its host)" if found else ""
