"""The address of the queue's database: what --queue takes, and how it is shown in messages."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

from opensora_sp.base.errors import UserError

# The engine's ranks get the address through their environment: a command line can be read by all.
QUEUE_VARIABLE = "OPENSORA_SP_QUEUE"
_SCHEMES = ("postgresql+psycopg", "postgresql", "postgres")


def is_postgres(url: str) -> bool:
    """Whether an address is a database that many groups share."""
    return url.partition("://")[0] in _SCHEMES


def parse_queue_url(text: str) -> str:
    """The address as libpq takes it. Raises UserError, which never shows a password."""
    example = "postgresql+psycopg://USER@HOST:5432/DATABASE"
    scheme, colon, rest = text.strip().partition("://")
    if not colon or scheme not in _SCHEMES:
        word = scheme if re.fullmatch(r"[a-z0-9+]{1,20}", scheme) and colon else "the value"
        raise UserError(
            f"--queue: {word} is not the address of a Postgres database, such as {example}; "
            "without --queue the queue is a file in --save-dir, for one machine"
        )
    url = f"postgresql://{rest}"
    try:
        if not url.isprintable():  # half a character, a line feed or NUL, which libpq takes badly
            raise ValueError
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises ValueError)
    except ValueError:
        raise UserError(f"--queue: the address cannot be read; it has the form {example}") from None
    if not parts.path.strip("/"):
        raise UserError(f"--queue {shown_url(url)} names no database: give {example}")
    return url


def shown_url(url: str) -> str:
    """The address for a message: without user, password and options."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port else ""
        return urlunsplit(("postgresql", f"{host}{port}", parts.path, "", ""))
    except ValueError:
        return "postgresql://…"


def without_password(text: str, url: str) -> str:
    """A message of the database's library, without the password that it might quote."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return text
    secrets = {parts.password or "", unquote(parts.password or "")}
    for found in re.findall(r"(?:^|&)password=([^&]*)", parts.query):
        secrets |= {found, unquote(found)}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "…")
    return text
