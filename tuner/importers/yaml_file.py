"""YAML configs with the line of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tuner.errors import UserError
from tuner.importers.keys import Block, is_text
from tuner.importers.python_syntax import read_text

_MOST_NODES = 100_000
"""Values of a file, each use of an alias counted: a few lines of aliases may stand for billions."""


def read_yaml(path: Path) -> Block:
    """The mapping of a YAML file. Raises UserError with `file:line` for what is no YAML, or no mapping."""
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _Reader(path).value(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem}); correct it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]}); correct it") from error
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply to be read; name a config file") from None
    if not isinstance(value, Block):
        raise UserError(f"{path}: not a config: it holds no keys at its top level; name a config file")
    return value


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._constructor = yaml.SafeLoader("")
        self._num_nodes = 0

    def value(self, node: yaml.Node) -> Any:
        self._num_nodes += 1
        if self._num_nodes > _MOST_NODES:
            raise UserError(f"{self._path}: more than {_MOST_NODES:,} values; name a config file")
        if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
            line = node.start_mark.line + 1
            raise UserError(
                f"{self._path}:{line}: not valid YAML here (the tag {node.tag}); write the value itself"
            )
        if isinstance(node, yaml.MappingNode):
            block = Block()
            self._fill(block, node)
            return block
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        value = self._constructor.construct_object(node)  # type: ignore[no-untyped-call]
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{self._path}:{node.start_mark.line + 1}: holds half of a character; correct it")
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    def _fill(self, block: Block, node: yaml.MappingNode) -> None:
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                bases = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for base in bases:
                    values = self.value(base)
                    if isinstance(values, Block):
                        block.merge({key: value for key, value in values.items() if key not in block})
                continue
            key = str(self.value(key_node))
            block[key] = self.value(value_node)
            block.lines[key] = key_node.start_mark.line + 1
