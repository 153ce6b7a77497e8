"""The tables of a shared queue in its database."""

from __future__ import annotations

from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import one_line
from opensora_sp.server.queue_url import shown_url, without_password
from opensora_sp.server.shared_link import Link, QueueLost

# Of all processes that make the tables at once, one does.
_LOCK = 0x0F5A_22
_FORM = 1
_OLDEST = 130_000  # the first with xid8
_TABLES = """
CREATE SCHEMA IF NOT EXISTS opensora_sp;
CREATE TABLE IF NOT EXISTS opensora_sp.folder (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    form integer NOT NULL,
    token text
);
CREATE SEQUENCE IF NOT EXISTS opensora_sp.epochs;
CREATE TABLE IF NOT EXISTS opensora_sp.groups (
    name text PRIMARY KEY,
    epoch bigint NOT NULL,
    parent text NOT NULL,
    about jsonb NOT NULL,
    state text NOT NULL,
    lease_s double precision NOT NULL,
    beat_at timestamptz NOT NULL,
    job text,
    attempt integer,
    progress jsonb,
    unfit jsonb NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS opensora_sp.jobs (
    id text PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('queued', 'taken', 'ended', 'gone')),
    priority integer NOT NULL,
    created_at timestamptz NOT NULL,
    shape text NOT NULL,
    spec jsonb NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    deaths integer NOT NULL DEFAULT 0,
    group_name text,
    epoch bigint,
    result jsonb,
    changed xid8 NOT NULL,
    changed_at timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_queued ON opensora_sp.jobs (priority, created_at, id)
    WHERE state = 'queued';
CREATE INDEX IF NOT EXISTS jobs_taken ON opensora_sp.jobs (group_name) WHERE state = 'taken';
CREATE INDEX IF NOT EXISTS jobs_gone ON opensora_sp.jobs (changed_at) WHERE state = 'gone';
CREATE INDEX IF NOT EXISTS jobs_changed ON opensora_sp.jobs (changed);
"""


def prepare_tables(link: Link, url: str) -> None:
    """Make the tables where they are not there. Raises UserError where that cannot be."""
    import psycopg

    where = f"--queue {shown_url(url)}"

    def make(connection: Any) -> int:
        if (version := connection.info.server_version) < _OLDEST:
            raise UserError(f"{where}: Postgres {version // 10_000} is older than 13")
        if connection.execute("SELECT to_regclass('opensora_sp.jobs')").fetchone()[0] is None:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
            connection.execute(_TABLES)
            connection.execute(
                "INSERT INTO opensora_sp.folder (form) VALUES (%s) ON CONFLICT DO NOTHING",
                [_FORM],
            )
        found = connection.execute("SELECT form FROM opensora_sp.folder").fetchone()
        return 0 if found is None else int(found[0])

    try:
        form = link.run(make)
    except QueueLost as error:
        raise UserError(f"{where}: the database does not answer: {error}") from None
    except psycopg.Error as error:
        why = without_password(one_line(str(error)), url)
        raise UserError(f"{where}: its tables cannot be made or read: {why}") from None
    if form != _FORM:
        raise UserError(
            f"{where}: its tables have the form {form}, and this version reads {_FORM}: give "
            "another database, or the version that made them"
        )
