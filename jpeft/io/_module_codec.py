# SPDX-License-Identifier: Apache-2.0
"""What codecs of methods that sit on matrices have in common: the keys that say where, and those that say how."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .. import seams
from .._graft import base_type
from .._matching import pattern_value
from .._method import Adapter
from ..methods import METHODS
from ._keys import check_keys
from ._names import Names
from ._selection import adapted_names, describe, read_pattern, read_places, write_pattern
from ._slots import Codec, Slot, per_layer

#: Keys that say where an adapter is.
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def write_targets(
    adapted: Collection[str], names: Names, *, layered: bool = True, in_out: bool = True
) -> dict[str, Any]:
    """The keys that say where an adapter on the modules `adapted` is.

    Args:
      layered: whether the method has keys for layers.
      in_out: whether it has one for kernels stored as `[d_in, d_out]`.
    """
    targets, layers = describe(adapted, names.every, layered=layered)
    return {
        "target_modules": targets,
        "exclude_modules": None,
        **({"layers_to_transform": layers, "layers_pattern": None} if layered else {}),
        **({"fan_in_fan_out": any(names.is_in_out(name) for name in adapted)} if in_out else {}),
    }


def check_matrix(adapter: Adapter, module: Any, names: Names, method: str, *, in_out: bool) -> None:
    """Refuses a module that PEFT's method does not take.

    Raises:
      ValueError: it is no matrix; or one stored as `[d_in, d_out]`, and not `in_out`.
    """
    path = adapter.site.path
    if not isinstance(seams.projection(module), seams.Matmul):
        raise ValueError(f"{path} is a {base_type(module).__name__}; PEFT's {method} files are written of matrices")
    if not in_out and any(names.is_in_out(name) for name in adapter.site.names):
        raise ValueError(
            f"{path} is a Conv1D in transformers, on which PEFT puts no {method}; merge and save the model"
        )


def module_codec(
    kind: str,
    peft_type: str,
    tensors: Callable[[Any, int], list[Slot]],
    keys: Mapping[str, str],
    plain: Mapping[str, Any],
    *,
    in_out: bool = False,
    excludes: bool = True,
    patterns: bool = False,
    write: Callable[[Any], dict[str, Any]] = lambda method: {},
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {},
    reads: str = "",
    **more: Any,
) -> Codec:
    """The codec of a method on matrices.

    Args:
      tensors: those of one layer: (adapter, layer) -> slots with keys behind the module's name, and indices in a layer.
      keys: PEFT's keys for fields of the method that mean the same.
      plain: the other keys that PEFT writes, with the values of what jpeft's method is.
      in_out: whether PEFT puts it on kernels stored as `[d_in, d_out]`.
      excludes: whether it has `exclude_modules`.
      patterns: whether it has a `rank_pattern` and an `alpha_pattern`.
      write, read: what one key cannot say: keys of a method, fields from a configuration.
      reads: the keys that `read` reads.
      **more: of `Codec`.
    """
    method: Any = METHODS[kind]
    known = [*WHERE, *keys.values(), *reads.split(), *(("rank_pattern", "alpha_pattern") if patterns else ())]

    def slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
        check_matrix(adapter, module, names, method.__name__, in_out=in_out)
        return per_layer(adapter.site, lambda i: tensors(adapter, i))

    def write_all(made: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
        adapted = adapted_names(adapters)
        config = {**plain, **write_targets(adapted, names, in_out=in_out), **write(made)}
        config |= {key: getattr(made, field) for field, key in keys.items()}
        if not excludes:
            del config["exclude_modules"]
        for field, pattern in (("rank", "rank_pattern"), ("alpha", "alpha_pattern")) if patterns else ():
            given, default = getattr(made, pattern), getattr(made, field)
            wanted = {name: pattern_value(given, name, default) for name in adapted}
            config[pattern] = write_pattern(given, default, wanted)
        return config

    def read_all(config: dict[str, Any], names: Names) -> Any:
        check_keys(config, method.__name__, known, plain)
        places = read_places(config, names, names.matrices)
        fields = {field: config[key] for field, key in keys.items() if key in config}
        for pattern in ("rank_pattern", "alpha_pattern") if patterns else ():
            fields[pattern] = read_pattern(config.get(pattern), places.adapted)
        return method(
            targets=places.targets,
            layers=places.layers,
            modules_to_save=places.modules_to_save,
            **fields,
            **read(config),
        )

    return Codec(kind, peft_type, lambda adapter: adapter, slots, write_all, read_all, **more)
