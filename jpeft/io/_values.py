# SPDX-License-Identifier: Apache-2.0
"""Of what type the values of an adapter_config.json are, checked before any method reads them."""

import re
import re._parser as parser  # type: ignore[import-not-found]  # no public module tells what an expression is made of
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: No size of an adapter is larger.
_MOST = 2**31 - 1


def _whole(value: Any) -> bool:
    return type(value) is int and -1 <= value <= _MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(value: Any, item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(item, value))


def _wholes(value: Any) -> bool:
    return _list(value, _whole)


def _names(value: Any) -> bool:
    return _text(value) or _list(value, lambda name: _text(name) and name != "")


_KINDS: Iterable[tuple[str, str, Callable[[Any], bool]]] = (
    (
        "a whole number",
        "r oft_block_size num_virtual_tokens num_transformer_submodules num_attention_heads num_layers token_dim "
        "encoder_hidden_size encoder_num_layers projection_prng_key n_frequency random_loc_seed target_r init_r tinit "
        "tfinal deltaT total_step decompose_factor num_cayley_neumann_terms",
        _whole,
    ),
    (
        "a number",
        "lora_alpha lora_dropout alpha rank_dropout module_dropout vera_dropout d_initial scaling eps beta1 beta2 "
        "orth_reg_weight encoder_dropout",
        _number,
    ),
    ("a string", "peft_type task_type base_model_name_or_path bias revision peft_version", _text),
    ("a name, or a list of names", "target_modules exclude_modules layers_pattern feedforward_modules", _names),
    (
        "a list of names",
        "modules_to_save target_parameters",
        lambda value: _list(value, lambda name: _text(name) and name != ""),
    ),
    ("a whole number, or a list of them", "layers_to_transform", lambda v: _whole(v) or _wholes(v)),
    ("a list of whole numbers", "token_indices", _wholes),
    (
        "a list of whole numbers, or an object of them",
        "trainable_token_indices",
        lambda v: _wholes(v) or (isinstance(v, dict) and all(map(_wholes, v.values()))),
    ),
    (
        "an object",
        "rank_pattern alpha_pattern",
        lambda v: isinstance(v, dict) and all(_number(x) or isinstance(x, list) for x in v.values()),
    ),
)
_CHECKS = {key: (what, check) for what, keys, check in _KINDS for key in keys.split()}
#: Keys whose strings are regular expressions: whole ones where the value is a string, or parts of one.
_EXPRESSIONS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
_IN_LISTS = ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


def check_values(config: Mapping[str, Any]) -> None:
    """Refuses values that no adapter has; null stands for a key that is not there.

    Raises:
      ValueError: all such keys, with what their values must be.
    """
    wrong = [
        f"{key} must be {_CHECKS[key][0]}, got {value!r:.100}"
        for key, value in config.items()
        if key in _CHECKS and value is not None and not _CHECKS[key][1](value)
    ]
    if not wrong:
        wrong = [
            f"{key} has the regular expression {text!r:.100}, which {why}"
            for key in _EXPRESSIONS
            for text in _expressions(key, config.get(key))
            if (why := _unfit(text))
        ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _expressions(key: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [*(value or ())] if key in _IN_LISTS else []


def _unfit(text: str) -> str | None:
    """Why an expression is not matched with names: it is none, or it could take for ever."""
    try:
        re.compile(text)
        return "repeats what is repeated, and could take for ever" if _nested(parser.parse(text), False) else None
    except (re.error, OverflowError, RecursionError) as error:
        return f"is none ({error})"


def _nested(items: Any, repeated: bool) -> bool:
    """Whether a part without an upper bound of its length, or nearly so, is repeated in the same way."""
    for operation, argument in items:
        inside, inner = repeated, argument
        if str(operation) in ("MAX_REPEAT", "MIN_REPEAT"):
            _, most, inner = argument
            inside = repeated or most > 16
            if repeated and most > 16:
                return True
        for part in _parts(inner):
            if _nested(part, inside):
                return True
    return False


def _parts(argument: Any) -> list[Any]:
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [part for item in argument for part in _parts(item)]
    return []
