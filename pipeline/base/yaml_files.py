"""YAML as Retort reads it: tasks, configurations, search spaces, prices, and the values of `--set`.

Of YAML's values, those that JSON has too. A file is bounded before it is read, what its aliases repeat is counted, and
every fault names the line.
"""

from __future__ import annotations

from typing import Any, NoReturn

import yaml

from pipeline.base import storage
from pipeline.base.errors import UserError, clip

MAX_BYTES = 2 << 20
MAX_NODES = 40_000  # PyYAML reads some 20,000 a second
MAX_DEPTH = 40

TAG = "tag:yaml.org,2002:"
NOT_IN_JSON = {f"{TAG}timestamp": "a date", f"{TAG}merge": "a merge key", f"{TAG}value": "a default value"}


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        UserError: it is missing, too large, not YAML or not a mapping, a key is written twice or is no string, or a value is
            none that JSON has.
    """
    return read_marked_yaml(path)[0]


def read_marked_yaml(path: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    """The same, and the nodes it was made from, which know how each value is written and on which line."""
    storage.regular_file(path)
    if storage.size(path) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no file of settings is")
    content, node = _parse(storage.read_text(path), path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{path} must hold a YAML mapping, found {'nothing' if content is None else f'a {type(content).__name__}'}"
        )
    return content, node


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text says; None where it says nothing.

    Raises:
        UserError: as `read_yaml`.
    """
    return _parse(text, source)[0]


def _parse(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    loader = None
    try:
        loader = _Loader(text, source)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = clip(", ".join(part for part in (error.context, error.problem) if part))
        raise UserError(f"{source} is not YAML{f', line {mark.line + 1}' if mark else ''}: {found}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # characters, and escapes and versions that are no numbers
        raise UserError(f"{source} is not YAML{f', line {loader.line + 1}' if loader else ''}: {clip(str(error))}") from error
    return (None if node is None else loader.value(node)), node


class _Loader(yaml.SafeLoader):
    """Composes nodes with PyYAML, and makes values of them itself."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self._source, self._depth, self._nodes = source, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, within bounds and without a tag of its own."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self._refuse(event.start_mark, f"tags such as {clip(event.tag, 40)} are not read: write the value itself")
        self._count(self._depth, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if self._depth == 0:
            self._nodes = 0  # counted again in `value`, where an alias is all that it repeats
        return node

    def _count(self, depth: int, mark: yaml.Mark) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._refuse(mark, f"more than {MAX_NODES:,} keys and values, with what aliases repeat")
        if depth > MAX_DEPTH:
            self._refuse(mark, f"nested deeper than {MAX_DEPTH} levels")

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """What a node says."""
        self._count(depth, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        content: dict[str, Any] = {}
        for key, item in node.value:
            name = self._key(key)
            if name in content:
                self._refuse(node.start_mark, f"{clip(name)} written twice in one mapping")
            content[name] = self.value(item, depth + 1)
        return content

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or (node.style is None and node.tag != f"{TAG}str"):
            written = f" `{clip(node.value)}`" if isinstance(node, yaml.ScalarNode) else ""
            advice = f': write "{clip(node.value)}" in quotes' if written else ""
            self._refuse(node.start_mark, f"the key{written} is no string to YAML{advice}")
        self._count(0, node.start_mark)
        return str(self._scalar(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = clip(node.value)
        if node.tag in NOT_IN_JSON:
            self._refuse(node.start_mark, f'YAML reads `{text}` as {NOT_IN_JSON[node.tag]}: write "{text}" in quotes')
        try:
            value = self.construct_object(node)
            str(value).encode()
        except UnicodeEncodeError:
            self._refuse(node.start_mark, f"{text!a} holds half a character: write it whole")
        except (ValueError, OverflowError):  # of more digits than Python reads or writes
            self._refuse(node.start_mark, f"`{text}` is too large a number")
        return value

    def _refuse(self, mark: yaml.Mark, problem: str) -> NoReturn:
        raise UserError(f"{self._source}, line {mark.line + 1}: {problem}")
