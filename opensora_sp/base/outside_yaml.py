"""YAML from outside the program: read as nodes, with limits of size and depth, and never built.

The nodes keep every value as it is written. Nothing is built from a tag, and an alias is not
followed into itself. Imports no torch, because the first checks of a run read such files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opensora_sp.base.errors import UserError

if TYPE_CHECKING:
    from yaml import Node

MOST_CHARACTERS = 1 << 20
_DEEPEST = 16  # a configuration has a list in a mapping


def parse_yaml(text: str, what: str) -> Node | None:
    """The root node of a text with one document; None of an empty one.

    what: how a message names the file. Raises UserError, with the line where it is known, for a
    text of over 2^20 characters, what is not YAML, and nesting deeper than 16 levels.
    """
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{what} has {len(text)} characters: at most {MOST_CHARACTERS} are read as YAML"
        )

    class Bounded(yaml.SafeLoader):
        """Counts the levels while it makes nodes of them."""

        depth = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            if self.depth >= _DEEPEST:
                line = self.peek_event().start_mark.line + 1
                raise UserError(
                    f"{what} is nested too deeply at line {line}: {_DEEPEST} levels are read"
                )
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        return yaml.compose(text, Loader=Bounded)
    # ValueError and OverflowError: a number in an escape or in the YAML version is too large.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"{what} is not YAML{line}: {' '.join(str(problem).split())}") from None
