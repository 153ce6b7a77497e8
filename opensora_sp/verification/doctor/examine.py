"""The doctor's examination: all checks on every rank, and the table on rank 0."""

from __future__ import annotations

import sys
from pathlib import Path

from opensora_sp.base.launcher import read_launch
from opensora_sp.parallel.session import Session
from opensora_sp.verification.doctor.check_result import CheckResult, merge, table
from opensora_sp.verification.doctor.collectives import check_collectives
from opensora_sp.verification.doctor.operations import check_operations
from opensora_sp.verification.doctor.surroundings import check_device, check_host, check_versions

# A broken collective may never return. After this many seconds the run ends and names it.
TIMEOUT_S = 120.0


def examine(session: Session, directory: Path) -> list[CheckResult]:
    """All results, merged over ranks, on every rank. directory: of outputs. Collective."""
    ranks_here = read_launch().local_world_size
    alone = check_versions() if session.leads else []
    everywhere = check_device(session)
    with session.control.stage("collectives"):
        everywhere += check_collectives(session)
    with session.control.stage("operations"):
        everywhere += check_operations(session.device)
    host = check_host(directory, ranks_here) if session.leads else []
    before, after = session.control.broadcast_object((alone, host) if session.leads else None)
    return [*before, *merge(session.control.all_gather_object(everywhere)), *after]


def report(session: Session, directory: Path) -> int:
    """Examine and print. Returns 1 on every rank if any check failed, else 0. Collective."""
    results = examine(session, directory)
    if session.leads:
        for line in table(results):
            print(line)
        sys.stdout.flush()
    return int(any(result.state == "FAILED" for result in results))
