"""YAML from outside the program: read as nodes or as plain values, with limits of size and depth.

The nodes keep every value as it is written. No object is built from a tag. Imports no torch,
because the first checks of a run read such files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown

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
        raise _not_yaml(error, what) from None


def yaml_values(text: str, what: str) -> Any:
    """The plain values of a text with one document: objects, lists, texts, numbers, dates.

    Raises UserError as `parse_yaml`, and for an alias, a key that is twice in one mapping, and a
    tag that is no plain value's.
    """
    import yaml

    node = parse_yaml(text, what)
    if node is None:
        return None
    # Aliases could make a small file a very large object.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{what}: the alias *{event.anchor} is not read; write it out")
    _refuse_twice(node, what)
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    # ValueError and OverflowError: a number or a date that cannot be.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise _not_yaml(error, what) from None
    finally:
        loader.dispose()


def _refuse_twice(node: Node, what: str) -> None:
    """Refuse a key that is there twice, of which YAML would silently take the last."""
    from yaml import MappingNode, SequenceNode

    if isinstance(node, SequenceNode):
        for item in node.value:
            _refuse_twice(item, what)
    elif isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise UserError(
                    f"{what} line {key.start_mark.line + 1}: the key {shown(name)} is there twice"
                )
            seen.add(name)
            _refuse_twice(value, what)


def _not_yaml(error: Exception, what: str) -> UserError:
    mark = getattr(error, "problem_mark", None)
    line = f" at line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "it cannot be read"
    return UserError(f"{what} is not YAML{line}: {' '.join(str(problem).split())}")
