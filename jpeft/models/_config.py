# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's config.json as a model's frozen dataclass, and back.

A field of the dataclass is an attribute of config.json by the same name. An attribute that is no field, has no fixed
value and is not known to leave the mathematics alone is refused by name: a setting that would be ignored is an error.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

_HARMLESS = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
decoder_start_token_id directionality diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id gradient_checkpointing id2label label2id language length_penalty max_length min_length
model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
output_hidden_states output_past output_scores pad_token_id prefix problem_type remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version
transformers.js_config typical_p use_bfloat16 use_cache
"""

#: Attributes that say how a model was made, is decoded or is called, not what it computes.
HARMLESS = frozenset(_HARMLESS.split())

#: Attributes of which one value is all that any model here supports.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
}


class Pairs(tuple[tuple[str, Any], ...]):
    """A mapping as a hashable value: its items, sorted by name. `dict(pairs)` gives the mapping."""


C = TypeVar("C")

#: Attributes that may be null where their field may not: each means what it means when it is left out.
_MAY_BE_NULL = ("num_decoder_layers", "num_key_value_heads", "num_labels", "rope_theta")
#: Attributes that every model type may have, beside the fields of its Config, and of which something is read.
_SHARED = {
    "architectures": tuple[str, ...] | None,
    "id2label": Mapping[str, Any] | None,
    "model_type": str,
    "num_labels": int | None,
    "rope_parameters": Mapping[str, Any] | None,
    "scale_decoder_outputs": bool,
}
#: Whole numbers that may be 0 and more, or -1 and more, where others are sizes.
_MAY_BE_0 = (
    *("conv_kernel_size", "head_dim", "max_window_layers", "num_decoder_layers", "num_key_value_heads"),
    *("sliding_window", "type_vocab_size"),
)
_MAY_BE_NEGATIVE = ("max_relative_positions", "position_buckets")
#: Above these no model is; what a file says beyond is damage, and would take all memory.
_MOST = {"layer": 10_000, "layers": 10_000, "labels": 1_000_000}


def check_values(config_type: type, hf: Mapping[str, Any]) -> None:
    """A config.json must have values of the types of the fields, in the ranges that numbers of their kind have.

    Where a field may be written in other types than its own, `READ_AS` of its Config says in which.

    Raises:
      ValueError: it has not; the message names every such attribute.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cast(Any, config_type)) if field.name != "hf"}
    wrong = [
        f"{name}={hf[name]!r:.100}"
        for name, kind in (kinds | _SHARED | getattr(config_type, "READ_AS", {})).items()
        if name in hf and not (hf[name] is None and name in _MAY_BE_NULL) and not _fits(name, hf[name], kind)
    ]
    labels = hf.get("id2label")
    if isinstance(labels, Mapping) and not all(str(key).isdecimal() for key in labels):
        wrong.append("id2label, whose keys are not whole numbers")
    if wrong:
        raise ValueError(f"config.json has values that a model cannot have: {', '.join(wrong)}")


def _fits(name: str, value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(name, value, one) for one in typing.get_args(kind))
    if kind is int:
        ending = name.rpartition("_")[2]
        least = -1 if ending == "id" or name in _MAY_BE_NEGATIVE else int(name not in _MAY_BE_0)
        return type(value) is int and least <= value <= _MOST.get(ending, 2**31 - 1)
    if kind is float:
        known = type(value) in (int, float) and 0 <= value <= 1e30
        return known and ("drop" not in name or value <= 1)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits("", one, typing.get_args(kind)[0]) for one in value)
    if kind is Pairs or typing.get_origin(kind) is not None:
        return isinstance(value, Mapping)
    return isinstance(value, kind)


def read(
    config_type: type[C],
    hf: Mapping[str, Any],
    *,
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    harmless: Collection[str] = (),
) -> C:
    """A `config_type` with the attributes of a config.json; those that it lacks keep the dataclass's defaults.

    Args:
      config_type: a frozen dataclass. Beside its own fields it has `num_labels`, the size of a classification head,
        and `hf`, which takes no part in comparison: the config.json it was read from, as text, so that what is
        harmless survives.
      hf: config.json, parsed.
      fixed: attributes that are supported with these values only, beside those that hold for every model.
      harmless: attributes that change nothing in this model, beside `HARMLESS`.

    Raises:
      ValueError: an unknown attribute, or an unsupported value; the message names them.
    """
    fixed = _FIXED | dict(fixed or {})
    fields = {field.name for field in dataclasses.fields(cast(Any, config_type))} - {"hf", "num_labels"}
    fixed = {name: values for name, values in fixed.items() if name not in fields}
    unknown = sorted({*hf} - fields - {*fixed} - {*harmless} - HARMLESS)
    if unknown:
        raise ValueError(
            f"config.json of a {hf.get('model_type')!r} model has attributes that could change what it computes and "
            f"are not supported: {', '.join(unknown)}"
        )
    wrong = [f"{name}={hf[name]!r}" for name, values in fixed.items() if name in hf and hf[name] not in values]
    if wrong:
        raise ValueError(f"config.json of a {hf.get('model_type')!r} model asks for {', '.join(wrong)}: not supported")
    values: dict[str, Any] = {name: _hashable(hf[name]) for name in fields if name in hf}
    values |= {"num_labels": _num_labels(hf), "hf": json.dumps(dict(hf), sort_keys=True)}
    return config_type(**values)


def write(config: Any, **changes: Any) -> dict[str, Any]:
    """config.json for `config`: what it was read from, with its fields and `changes` on top."""
    hf: dict[str, Any] = json.loads(config.hf)
    names = {field.name for field in dataclasses.fields(config)} - {"hf", "num_labels"}
    hf |= {name: _plain(getattr(config, name)) for name in names}
    hf.pop("num_labels", None)  # said by id2label
    if _num_labels(hf) != config.num_labels:
        hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        hf["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return dict(sorted((hf | changes).items()))


def _num_labels(hf: Mapping[str, Any]) -> int:
    """transformers' rule: as many as there are label names, and 2 by default."""
    labels = hf.get("id2label")
    return len(labels) if labels is not None else hf.get("num_labels") or 2


def _hashable(value: Any) -> Any:
    """Lists as tuples and mappings as `Pairs`, all the way down."""
    if isinstance(value, Mapping):
        return Pairs(sorted((key, _hashable(item)) for key, item in value.items()))
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """The inverse of `_hashable`."""
    if isinstance(value, Pairs):
        return {key: _plain(item) for key, item in value}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
