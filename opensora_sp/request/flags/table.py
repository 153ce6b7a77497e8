"""Every flag of the programs, in one table: type, default, meaning, and what delivers it.

The parser, the YAML keys, `--help`, docs/flags.md and the refusals are all read from here.
"""

from collections.abc import Iterator

from opensora_sp.request.flags.flag import Flag, Group
from opensora_sp.request.flags.how import RUN_GROUPS
from opensora_sp.request.flags.what import REQUEST_GROUPS

GROUPS: tuple[Group, ...] = (*REQUEST_GROUPS, *RUN_GROUPS)


def all_flags() -> Iterator[Flag]:
    """Every flag, in the order of the table."""
    for _, flags in GROUPS:
        yield from flags
