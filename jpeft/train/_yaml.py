# SPDX-License-Identifier: Apache-2.0
"""YAML as plain values: no key twice, no value that stands for ever more of itself, numbers as everywhere else."""

import re
from typing import Any

#: How many values a configuration may be made of, with what aliases stand for counted each time.
MOST_VALUES = 100_000
#: How deep they may be nested.
MOST_LEVELS = 64


def read(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
      ValueError: it is not YAML, says a key twice, or is deeper or larger (by its aliases) than any honest one.
    """
    import yaml

    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, MOST_LEVELS, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _count(node: Any, levels: int, counted: dict[int, int]) -> int:
    """How many values a node stands for."""
    import yaml

    if levels == 0:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep, or holds itself")
    if id(node) not in counted:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in inner if isinstance(key, yaml.ScalarNode)]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise ValueError(f"it says {', '.join(twice)} twice, at line {node.start_mark.line + 1} and below")
            inner = [part for pair in inner for part in pair]
        counted[id(node)] = 1 + sum(_count(part, levels - 1, counted) for part in inner)
    if counted[id(node)] > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    return counted[id(node)]


def _loader() -> Any:
    """YAML's safe loader, which reads 1e-3 as the number that it is everywhere else (YAML 1.1 wants 1.0e-3)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), [*"-+0123456789."]
    )
    return Loader
