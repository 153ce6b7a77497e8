"""The queue of many groups: jobs, who makes each, and how it ended, in one Postgres database.

Gateways put jobs in and look; groups take them. What decides is always one statement of the
database, by its clock: who has a job, which attempt that is, and whether a group is still there.
docs/several_machines.md says what follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from opensora_sp.server.durable import GIVEN_UP, MOST_ATTEMPTS
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec
from opensora_sp.server.shared_link import CHANNEL, Link
from opensora_sp.server.shared_rows import COLUMNS, Claim, Group, Row, read_row, read_spec
from opensora_sp.server.shared_tables import prepare_tables

# A group that has not been heard of for this long counts as dead, and its job goes to another.
LEASE_SECONDS = 15.0
# Rows of deleted jobs and of dead groups stay this long, so that every gateway hears of them.
TOMBSTONE_SECONDS, DEAD_GROUP_SECONDS = 3600.0, 86_400.0
_CHANGED = "changed = pg_current_xact_id(), changed_at = clock_timestamp()"
# A group that died in a job gives it back; after MOST_ATTEMPTS of them the job is given up.
_BACK = f"""
    state = CASE WHEN deaths + %(died)s >= {MOST_ATTEMPTS} THEN 'ended' ELSE 'queued' END,
    result = CASE WHEN deaths + %(died)s >= {MOST_ATTEMPTS} THEN jsonb_build_object(
        'finished_at', extract(epoch FROM clock_timestamp()),
        'error', '{GIVEN_UP}', 'error_code', 'engine_ended') END,
    deaths = deaths + %(died)s, {_CHANGED}
"""
_ALIVE = "g.beat_at > clock_timestamp() - g.lease_s * interval '1 second'"


class SharedQueue:
    """The queue. Its calls take milliseconds and may block: use them in a thread.

    All but `prepare` raise QueueLost while the database does not answer.
    """

    def __init__(self, url: str, name: str = "opensora-sp", *, listens: bool = False) -> None:
        self.url = url
        self.link = Link(url, name, listens=listens)

    def prepare(self) -> None:
        """Make the tables where they are not there. Raises UserError where that cannot be."""
        prepare_tables(self.link, self.url)

    def folder_token(self, proposed: str) -> str:
        """The token that the shared folder must hold; `proposed` where there was none yet."""

        def decide(connection: Any) -> str:
            connection.execute(
                "UPDATE opensora_sp.folder SET token = %s WHERE token IS NULL", [proposed]
            )
            return str(connection.execute("SELECT token FROM opensora_sp.folder").fetchone()[0])

        return self.link.run(decide)

    # What gateways do.

    def put(self, spec: JobSpec) -> None:
        """Add a job. The same id twice is one job. Its place is by the database's clock."""
        self.put_many([spec])

    def put_many(self, specs: Collection[JobSpec]) -> None:
        """Add jobs in this order, as `put` does."""
        from psycopg.types.json import Jsonb

        def insert(connection: Any) -> None:
            connection.execute(
                "INSERT INTO opensora_sp.jobs AS j"
                " (id, state, priority, created_at, shape, spec, changed, changed_at)"
                " SELECT spec->>'id', 'queued', (spec->>'priority')::integer, clock_timestamp(),"
                "  coalesce(spec#>>'{shown,cost,shape}', ''), spec, pg_current_xact_id(),"
                "  clock_timestamp() FROM jsonb_array_elements(%s) AS spec"
                # One that was deleted is wanted again.
                " ON CONFLICT (id) DO UPDATE SET state = 'queued', result = NULL, deaths = 0,"
                "  spec = excluded.spec, created_at = excluded.created_at,"
                "  changed = excluded.changed, changed_at = excluded.changed_at"
                " WHERE j.state = 'gone'",
                [Jsonb([asdict(spec) for spec in specs])],
            )
            _tell(connection)

        self.link.run(insert)

    def outcomes(
        self, job_ids: Collection[str]
    ) -> dict[str, tuple[str, str | None, tuple[int, str] | None]]:
        """Of each of these jobs that is known: state, error, and attempt and name of its output."""
        found = self.link.run(
            lambda connection: connection.execute(
                "SELECT id, state, result->>'error', attempt, result->>'file'"
                " FROM opensora_sp.jobs WHERE id = ANY(%s)",
                [list(job_ids)],
            ).fetchall()
        )
        return {
            job: (state, error, None if file is None else (attempt, file))
            for job, state, error, attempt, file in found
        }

    def make_again(self, job_ids: Collection[str]) -> None:
        """Queue jobs anew that have failed."""

        def again(connection: Any) -> None:
            connection.execute(
                "UPDATE opensora_sp.jobs SET state = 'queued', result = NULL, deaths = 0,"
                f" {_CHANGED} WHERE id = ANY(%s) AND state = 'ended'"
                " AND result->>'error' IS NOT NULL",
                [list(job_ids)],
            )
            _tell(connection)

        self.link.run(again)

    def remove(self, job_id: str) -> None:
        """Delete a job, whatever it does: whoever makes it hears of that within a second."""
        self.link.run(
            lambda connection: connection.execute(
                f"UPDATE opensora_sp.jobs SET state = 'gone', result = NULL, {_CHANGED}"
                " WHERE id = %s AND state <> 'gone'",
                [job_id],
            )
        )

    def changes(self, since: int | None) -> tuple[list[Row], int]:
        """Jobs that changed since the look that gave `since`, and what to give the next time.

        None: all that are not deleted. A job may come twice. `since` is a transaction's number, not
        a time: everything below it had ended when that look was made.
        """

        def look(connection: Any) -> tuple[list[Any], int]:
            floor = connection.execute(
                "SELECT pg_snapshot_xmin(pg_current_snapshot())::text"
            ).fetchone()[0]
            where = "state <> 'gone'" if since is None else "changed >= %s::text::xid8"
            rows = connection.execute(
                f"SELECT {COLUMNS} FROM opensora_sp.jobs WHERE {where}",
                [] if since is None else [str(since)],
            ).fetchall()
            return rows, int(floor)

        rows, floor = self.link.run(look)
        return [read_row(found) for found in rows], floor

    def row(self, job_id: str) -> Row | None:
        """One job; None where there is none, or it was deleted."""
        found = self.link.run(
            lambda connection: connection.execute(
                f"SELECT {COLUMNS} FROM opensora_sp.jobs WHERE id = %s AND state <> 'gone'",
                [job_id],
            ).fetchone()
        )
        return None if found is None else read_row(found)

    def groups(self) -> list[Group]:
        """All groups that were heard of within the last day."""
        rows = self.link.run(
            lambda connection: connection.execute(
                f"SELECT name, epoch, {_ALIVE}, state, about, job, attempt, progress, unfit"
                " FROM opensora_sp.groups g ORDER BY name"
            ).fetchall()
        )
        return [
            Group(
                name=name,
                epoch=epoch,
                alive=alive,
                state=state,
                about=about,
                job=job,
                attempt=attempt,
                progress=None if progress is None else JobProgress(**progress),
                unfit=unfit,
            )
            for name, epoch, alive, state, about, job, attempt, progress, unfit in rows
        ]

    def tidy(self, older: float = TOMBSTONE_SECONDS) -> None:
        """Remove rows of jobs deleted long ago, and of groups that have long been dead."""

        def tidy(connection: Any) -> None:
            connection.execute(
                "DELETE FROM opensora_sp.jobs WHERE state = 'gone'"
                " AND changed_at < clock_timestamp() - %s * interval '1 second'",
                [older],
            )
            connection.execute(
                "DELETE FROM opensora_sp.groups"
                " WHERE beat_at < clock_timestamp() - %s * interval '1 second'",
                [DEAD_GROUP_SECONDS],
            )

        self.link.run(tidy)

    def give_out_again(self) -> tuple[list[tuple[str, str]], float]:
        """Give out again what groups have that were not heard of for longer than their lease.

        Returns each job's id and its group, and the seconds until the next group could count as
        dead: 0 where one does whose job was not given out. Nothing is given out while this process
        has had contact for less than a lease, or the database was started within one: the groups
        could not be heard of.
        """

        def release(connection: Any) -> tuple[list[tuple[str, str]], float]:
            found, seconds = connection.execute(
                f"WITH given AS (UPDATE opensora_sp.jobs SET {_BACK} WHERE id IN ("
                " SELECT j.id FROM opensora_sp.jobs j LEFT JOIN opensora_sp.groups g"
                "  ON g.name = j.group_name AND g.epoch = j.epoch"
                f" WHERE j.state = 'taken' AND (g.name IS NULL OR NOT {_ALIVE})"
                "  AND coalesce(g.lease_s, 0) < least(%(steady)s::float8, extract(epoch FROM"
                "   clock_timestamp() - pg_postmaster_start_time()))"
                " FOR UPDATE OF j SKIP LOCKED) RETURNING id, group_name)"
                " SELECT (SELECT jsonb_agg(jsonb_build_array(id, group_name)) FROM given),"
                "  (SELECT min(least(g.lease_s, g.lease_s + extract(epoch FROM"
                "   g.beat_at - clock_timestamp())))::float8 FROM opensora_sp.groups g"
                f"   WHERE {_ALIVE} OR g.name IN"
                "    (SELECT group_name FROM opensora_sp.jobs WHERE state = 'taken'))",
                # Asked here: the connection may be a new one.
                {"died": 1, "steady": self.link.steady_seconds()},
            ).fetchone()
            if found:
                _tell(connection)
            given = [(str(job), str(group)) for job, group in found or ()]
            return given, max(0.0, seconds or 0.0)

        return self.link.run(release)

    # What groups do.

    def register(
        self, name: str, parent: str, about: Mapping[str, Any], lease: float
    ) -> int | None:
        """Begin as a group; its epoch. None while a living group of another parent has the name.

        What an earlier engine of this group had is given out again.
        """
        from psycopg.types.json import Jsonb

        def begin(connection: Any) -> int | None:
            found = connection.execute(
                "INSERT INTO opensora_sp.groups AS g"
                " (name, epoch, parent, about, state, lease_s, beat_at, unfit) VALUES"
                " (%s, nextval('opensora_sp.epochs'), %s, %s, 'starting', %s, clock_timestamp(),"
                "  '{}') ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch,"
                " parent = excluded.parent, about = excluded.about, state = excluded.state,"
                " lease_s = excluded.lease_s, beat_at = excluded.beat_at, job = NULL,"
                " attempt = NULL, progress = NULL, unfit = excluded.unfit"
                f" WHERE g.parent = excluded.parent OR NOT {_ALIVE} RETURNING epoch",
                [name, parent, Jsonb(dict(about)), lease],
            ).fetchone()
            if found is None:
                return None
            _give_back(connection, name, "epoch IS DISTINCT FROM %(only)s", int(found[0]), died=1)
            return int(found[0])

        return self.link.run(begin)

    def beat(
        self,
        name: str,
        epoch: int,
        *,
        state: str,
        claim: Claim | None = None,
        progress: JobProgress | None = None,
        unfit: Mapping[str, str] | None = None,
    ) -> bool | None:
        """A sign of life; whether the claim still holds.

        None: another engine has begun under the group's name.
        """
        from psycopg.types.json import Jsonb

        def sign(connection: Any) -> bool | None:
            found = connection.execute(
                "UPDATE opensora_sp.groups SET beat_at = clock_timestamp(), state = %(state)s,"
                " job = %(job)s::text, attempt = %(attempt)s::integer, "
                " progress = %(progress)s, unfit = %(unfit)s"
                " WHERE name = %(name)s AND epoch = %(epoch)s RETURNING (SELECT j.state = 'taken'"
                "  AND j.attempt = %(attempt)s::integer FROM opensora_sp.jobs j"
                "  WHERE j.id = %(job)s::text)",
                {
                    "name": name,
                    "epoch": epoch,
                    "state": state,
                    "job": None if claim is None else claim.id,
                    "attempt": None if claim is None else claim.attempt,
                    "progress": None if progress is None else Jsonb(asdict(progress)),
                    "unfit": Jsonb(dict(unfit or {})),
                },
            ).fetchone()
            return None if found is None else claim is None or bool(found[0])

        return self.link.run(sign)

    def claim(
        self,
        name: str,
        epoch: int,
        unfit: Collection[str],
        fits: Callable[[str, JobSpec], bool],
    ) -> Claim | None:
        """Take the first job that this group can make; None where there is none.

        unfit: shapes that it cannot make. fits: asked of the first job; where it says no, call
        again with that shape among the unfit ones.
        """

        def take(connection: Any) -> Claim | None:
            found = connection.execute(
                "SELECT id, shape, spec FROM opensora_sp.jobs WHERE state = 'queued'"
                " AND shape <> ALL(%s) ORDER BY priority, created_at, id LIMIT 1"
                " FOR UPDATE SKIP LOCKED",
                [list(unfit)],
            ).fetchone()
            if found is None:
                return None
            spec = read_spec(found[2])
            if not fits(found[1], spec):
                return None
            # A sign of life at once: the lease begins with the claim.
            mine = connection.execute(
                "UPDATE opensora_sp.groups SET beat_at = clock_timestamp()"
                " WHERE name = %s AND epoch = %s RETURNING 1",
                [name, epoch],
            ).fetchone()
            if mine is None:
                return None
            attempt = connection.execute(
                "UPDATE opensora_sp.jobs SET state = 'taken', attempt = attempt + 1,"
                f" group_name = %s, epoch = %s, {_CHANGED} WHERE id = %s RETURNING attempt",
                [name, epoch, found[0]],
            ).fetchone()[0]
            return Claim(found[0], int(attempt), spec)

        # Words that came while a job was made are of what this look sees. A group that is never
        # idle would keep them without bound.
        self.link.wait(0)
        return self.link.run(take)

    def publish(self, claim: Claim, result: JobResult) -> str:
        """Write how a job ended, if no later attempt has begun: the state that the job has then.

        It is ended if this result is the job's. Else it is another's: queued or taken where a later
        attempt makes it, "ended elsewhere" where one has ended it, gone where it was deleted.
        """
        from psycopg.types.json import Jsonb

        def write(connection: Any) -> str:
            found = connection.execute(
                f"UPDATE opensora_sp.jobs SET state = 'ended', result = %s, {_CHANGED}"
                " WHERE id = %s AND attempt = %s AND state IN ('taken', 'queued') RETURNING 1",
                [Jsonb(asdict(result)), claim.id, claim.attempt],
            ).fetchone()
            if found is not None:
                return "ended"
            state, attempt = self._standing(connection, claim)
            # It may have been written by a call of which the answer was lost.
            return "ended elsewhere" if state == "ended" and attempt != claim.attempt else state

        return self.link.run(write)

    def engine_died(self, name: str, parent: str) -> int:
        """Give out again what an engine of this parent had, which has died; how many jobs that is.

        It counts among the ends after which a job is given up. Another command may have the name by
        now, or have had it all along: its jobs stay with it.
        """
        return self.link.run(
            lambda connection: _give_back(
                connection,
                name,
                "epoch IN (SELECT g.epoch FROM opensora_sp.groups g"
                " WHERE g.name = %(name)s AND g.parent = %(only)s)",
                parent,
                died=1,
            )
        )

    def give_back(self, name: str, epoch: int) -> int:
        """Give out again what this engine has, and does not make; it counts as no death."""
        return self.link.run(
            lambda connection: _give_back(connection, name, "epoch = %(only)s", epoch, died=0)
        )

    def let_go(self, name: str, epoch: int, claim: Claim) -> str:
        """This engine makes a job no more: the state that the job has then, as for `publish`.

        Where it still is this attempt's it is given out again. Else nothing changes: it was
        deleted, or another attempt has it.
        """

        def end(connection: Any) -> str:
            connection.execute(
                f"UPDATE opensora_sp.jobs SET state = 'queued', result = NULL, {_CHANGED}"
                " WHERE id = %s AND state = 'taken' AND group_name = %s AND epoch = %s"
                " AND attempt = %s",
                [claim.id, name, epoch, claim.attempt],
            )
            _tell(connection)
            state, attempt = self._standing(connection, claim)
            return "ended elsewhere" if state == "ended" and attempt != claim.attempt else state

        return self.link.run(end)

    def leave(self, name: str, epoch: int) -> None:
        """The group ends in order; what it had is given out again, and counts as no death."""

        def end(connection: Any) -> None:
            _give_back(connection, name, "epoch = %(only)s", epoch, died=0)
            connection.execute(
                "DELETE FROM opensora_sp.groups WHERE name = %s AND epoch = %s", [name, epoch]
            )

        self.link.run(end)

    def completed_by(self, name: str) -> int:
        """How many jobs a group of this name has completed."""
        return int(
            self.link.run(
                lambda connection: connection.execute(
                    "SELECT count(*) FROM opensora_sp.jobs WHERE state = 'ended'"
                    " AND group_name = %s AND result->>'error' IS NULL",
                    [name],
                ).fetchone()
            )[0]
        )

    def close(self) -> None:
        """Give the connection back."""
        self.link.close()

    @staticmethod
    def _standing(connection: Any, claim: Claim) -> tuple[str, int]:
        found = connection.execute(
            "SELECT state, attempt FROM opensora_sp.jobs WHERE id = %s", [claim.id]
        ).fetchone()
        return ("gone", 0) if found is None else (str(found[0]), int(found[1]))


def _give_back(connection: Any, name: str, which: str, only: int | str, *, died: int) -> int:
    """Give out again what engines of a group have. which: of them, a condition on %(only)s."""
    found = connection.execute(
        f"UPDATE opensora_sp.jobs SET {_BACK} WHERE state = 'taken'"
        f" AND group_name = %(name)s AND {which}",
        {"died": died, "name": name, "only": only},
    )
    if found.rowcount:
        _tell(connection)
    return int(found.rowcount)


def _tell(connection: Any) -> None:
    """Wake the groups that wait for a job."""
    connection.execute(f"NOTIFY {CHANNEL}")
