"""Every flag of the programs, in one table: type, default, meaning, and what delivers it.

The parser, the YAML keys, `--help`, docs/flags.md and the refusals are all read from here.
"""

from collections.abc import Iterator

from opensora_sp.cli.flags import Flag, Group
from opensora_sp.cli.request_flags import REQUEST_GROUPS
from opensora_sp.cli.run_flags import RUN_GROUPS

GROUPS: tuple[Group, ...] = (*REQUEST_GROUPS, *RUN_GROUPS)


def all_flags() -> Iterator[Flag]:
    """Every flag, in the order of the table."""
    for _, flags in GROUPS:
        yield from flags
