"""Reading and writing YAML configurations, with the names and the spelling of the flags.

Every plain value is read as text and then parsed like the text of a flag. YAML's own types are not
used, because YAML 1.1 reads the aspect ratio 9:16 as the number 556.
"""

from collections.abc import Mapping
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_yaml import parse_yaml
from opensora_sp.base.value_types import shown
from opensora_sp.request.named_configs import find_config

Raw = str | list[str | None] | None  # a value before it is parsed

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "timestamp", "value", "str", "seq")
)


def read_config(path: str, flag: str = "--config") -> dict[str, Raw]:
    """Key (with underscores) → value as written, of a file or of a name such as 720p-16s.

    Raises UserError naming the flag, the file and the line.
    """
    from yaml import MappingNode

    what = f"{flag} {shown(path)}"
    text = access.read_text(find_config(path, flag), limit=access.CONFIG_LIMIT, what=what)
    node = parse_yaml(text, what)
    if node is None:
        return {}
    if not isinstance(node, MappingNode):
        raise UserError(f"{what} is not a list of `key: value` lines")
    values: dict[str, Raw] = {}
    for key_node, value_node in node.value:
        where = f"{what} line {key_node.start_mark.line + 1}"
        key = _scalar(key_node, where)
        name = (key or "").replace("-", "_")
        if name in values:
            raise UserError(f"{where}: the key {shown(key)} is there twice")
        values[name] = _value(value_node, where)
    return values


def _value(node: Any, where: str) -> Raw:
    from yaml import SequenceNode

    if isinstance(node, SequenceNode):
        _check_tag(node, where)
        return [_scalar(item, where) for item in node.value]
    return _scalar(node, where)


def _scalar(node: Any, where: str) -> str | None:
    from yaml import ScalarNode

    if not isinstance(node, ScalarNode):
        raise UserError(f"{where}: a plain value or a list of plain values is needed")
    _check_tag(node, where)
    return None if node.tag.endswith(":null") else str(node.value)


def _check_tag(node: Any, where: str) -> None:
    """Refuse tags such as `!!python/...`, which are neither text nor allowed to build objects."""
    if node.tag not in _PLAIN_TAGS:
        raise UserError(f"{where}: the tag {shown(node.tag)} is not allowed")


def write_config(values: Mapping[str, Any]) -> str:
    """YAML that read_config reads back to the same values."""
    import yaml

    text: str = yaml.safe_dump(
        dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False, width=2**31
    )
    return text
