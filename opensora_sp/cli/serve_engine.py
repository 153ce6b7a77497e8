"""One rank of the warm engine: started by `opensora-sp serve`, not by people."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import read_launch
from opensora_sp.base.screen import on_any_screen
from opensora_sp.cli.console import refuse
from opensora_sp.cli.program import Prepared, run_prepared
from opensora_sp.parallel.watchdog.orphans import watch_launcher
from opensora_sp.parallel.watchdog.signals import leave
from opensora_sp.server.engine_group import serve_jobs
from opensora_sp.server.logs import set_level, write_json
from opensora_sp.server.settings import GroupSettings


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank until a signal comes; argv: --settings and JSON."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 2 or words[0] != "--settings":
        return refuse(
            UserError("opensora-sp serve starts this; it is no command"), same_everywhere=True
        )
    settings = GroupSettings.from_json(words[1])
    set_level(settings.log_level)
    if settings.log_format == "json":
        write_json(read_launch().rank)
    watch_launcher()
    try:
        job = settings.first_job()
    except UserError as error:
        return refuse(error, same_everywhere=True)
    code = run_prepared(Prepared(job, lambda: serve_jobs(settings, job)))
    # A thread of the queue may still wait for its job, which is the next engine's.
    leave(code)


if __name__ == "__main__":
    sys.exit(main())
