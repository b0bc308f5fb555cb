# SPDX-License-Identifier: Apache-2.0
"""Prompts and prefixes in PEFT's files: one tensor called prompt_embeddings, and no targets.

A prompt is `[num_tokens, d_model]`. A prefix is `[num_tokens, 2 · layers · kv_heads · d_head]`: of layer l the keys, as
they are after the rotary embedding, and then the values. What a network computes is written as what it is, folded, and
PEFT's P_TUNING, which holds no more than a prompt, is read as one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import seams
from .._method import Adapter, Method
from ..methods import METHODS
from ..models._families import FAMILIES
from ._keys import check_keys
from ._names import Names
from ._selection import saved_modules
from ._slots import Codec, Slot

#: How a network was built whose outputs alone are in the file, and how a table was started.
_NETWORK = "encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type prefix_projection"
_START = "init_weights prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path"
_SIZES = "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim"
_KNOWN = ("modules_to_save", *_NETWORK.split(), *_START.split(), *_SIZES.split())

#: What transformers' configurations call these numbers.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")

#: Models on which PEFT's prefixes are something else, by their type.
_NO_PREFIX = {
    "deberta-v2": "transformers' DeBERTa takes no keys and values from outside",
    "distilbert": "transformers' DistilBERT takes no keys and values from outside",
    "t5": (
        "it puts them in T5's decoder alone, where a query adds to each the bias of a past token's distance, which "
        "jpeft's prefixes do not have"
    ),
}


def _same(adapter: Adapter) -> Adapter:
    return adapter


def _none(adapter: Any, module: Any, names: Names) -> list[Slot]:
    """Virtual tokens are all at the model's root."""
    return []


# Prompts ------------------------------------------------------------------------------------------------------------


def _prompt(adapter: Any) -> list[Slot]:
    return [Slot("prompt_embeddings", adapter.prompt, prefix="")]


def _write_prompt(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    _check_tokens(names)
    sites = [adapter.site for adapter in adapters if adapter.site.seam == "input"]
    blocks = sorted((site.block for site in sites), reverse=True)  # an encoder's before a decoder's
    wanted = max(found.module.block for found in names.found.values() if isinstance(found.module, seams.InputEmbedding))
    if blocks != [wanted]:
        raise ValueError(
            f"the prompt stands in front of the input of the {' and the '.join(blocks)}, and PEFT reads one in front "
            f"of the {wanted}'s alone; adapt with blocks={wanted!r}"
        )
    _check_table(names, [adapter.site.path for adapter in adapters if adapter.saved_layers])
    hf = names.config.to_hf()
    return {
        "num_attention_heads": _number(hf, _HEADS),
        "num_layers": _number(hf, _LAYERS),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": method.num_tokens,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": sites[0].d_out,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def _read_prompt(config: dict[str, Any], names: Names) -> Method:
    saved = _read_saved(config, names)
    _check_table(names, saved)
    method: Any = METHODS["prompt_tuning"]
    return method(num_tokens=config["num_virtual_tokens"], modules_to_save=saved)


def _prompt_counted(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Of two submodules' prompts PEFT trains and reads the encoder's alone, which stands first."""
    tensors, tokens = dict(tensors), config["num_virtual_tokens"]
    prompt = tensors.get("prompt_embeddings")
    if config.get("num_transformer_submodules") == 2 and prompt is not None and prompt.shape[0] == 2 * tokens:
        tensors["prompt_embeddings"] = prompt._replace(shape=(tokens, *prompt.shape[1:]))
    return tensors


def _check_table(names: Names, saved: Sequence[str]) -> None:
    """Refuses a word table that is trained whole: behind a prompt PEFT reads the base's."""
    for path in saved:
        module = names.found[path].module
        seam = seams.projection(module) if seams.kind(module) == "projection" else None
        if isinstance(seam, seams.Lookup) and seam.dims(module).d_in == names.config.vocab_size:
            raise ValueError(
                f"modules_to_save has {path}, and behind a prompt PEFT reads the base's own table of words, so that "
                "the trained one would do nothing there; leave it out"
            )


def _number(hf: Mapping[str, Any], keys: Sequence[str]) -> int:
    return next(hf[key] for key in keys if key in hf)


# Prefixes -----------------------------------------------------------------------------------------------------------


def _prefix(adapter: Any) -> list[Slot]:
    tokens, *sizes = adapter.prefix.shape
    return [Slot("prompt_embeddings", adapter.prefix, prefix="", shape=(tokens, sizes[0] * sizes[1] * sizes[2]))]


def _write_prefix(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    _check_tokens(names)
    _check_model(names)
    sites = [adapter.site for adapter in adapters if adapter.site.seam == "keys_values"]
    if method.gate:
        raise ValueError("PEFT's files hold no gates, and without them a gated prefix is another")
    if not method.shift_positions:
        raise ValueError(
            "PEFT counts a prefix as past tokens, behind which the text's positions go up, and in this adapter they "
            "stay; adapt with shift_positions=True"
        )
    if len(sites) < len([*_attentions(names)]) or not all(all(site.active) for site in sites):
        raise ValueError("PEFT puts a prefix into the attention of every layer; adapt without layers= and blocks=")
    layers, width = sum(len(site.names) for site in sites), sites[0].d_out
    return {
        "encoder_hidden_size": width,
        "init_weights": None,
        "num_attention_heads": sites[0].heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": method.num_tokens,
        "prefix_projection": False,
        "token_dim": width,
    }


def _read_prefix(config: dict[str, Any], names: Names) -> Method:
    _check_model(names)
    own = [*_attentions(names)]
    wanted = {"num_layers": sum(layers for layers, _ in own), "num_attention_heads": own[0][1]}
    for key, number in wanted.items():
        if config.get(key) != number:
            raise ValueError(f"{key} is {config.get(key)}, and this model's keys are those of {number}")
    method: Any = METHODS["prefix_tuning"]
    saved = _read_saved(config, names)
    return method(num_tokens=config["num_virtual_tokens"], shift_positions=True, modules_to_save=saved)


def _check_model(names: Names) -> None:
    """Refuses a model on which PEFT's prefixes are something else."""
    reason = _NO_PREFIX.get(names.config.model_type)
    if reason is None and any(getattr(names.config, "windows", ())):
        reason = (
            "it counts them as past tokens, off which the attention's window slides, while jpeft's stay in sight; if "
            "no text is longer than the window, take sliding_window out of the base's config.json"
        )
    if reason is not None:
        raise ValueError(f"PEFT has no form for this model's prefixes: {reason}")


def _attentions(names: Names) -> Iterator[tuple[int, int]]:
    """(layers, key heads) of every place between keys, values and attention."""
    for found in names.found.values():
        if isinstance(found.module, seams.KeyValues):
            yield len(found.names), found.module.kv_heads


# Both ---------------------------------------------------------------------------------------------------------------


def _check_tokens(names: Names) -> None:
    """Refuses a model that reads no tokens."""
    if FAMILIES[names.config.model_type].reads != "input_ids":
        raise ValueError(
            f"PEFT's virtual tokens go with models that are called with tokens, and a {names.config.model_type} model "
            "is not: PEFT has no form for this adapter"
        )


def _read_saved(config: Mapping[str, Any], names: Names) -> list[str]:
    """Checks the keys of a configuration, and gives the paths of the modules that are saved whole."""
    _check_tokens(names)
    check_keys(config, "virtual tokens", _KNOWN)
    tokens = config.get("num_virtual_tokens")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"num_virtual_tokens is {tokens!r}, and must be a whole number of at least 1")
    return sorted({names.paths[name] for name in saved_modules(config, names, False)})


PROMPT_TUNING = Codec(
    "prompt_tuning", "PROMPT_TUNING", _same, _none, _write_prompt, _read_prompt,
    shared=_prompt, counted=_prompt_counted, prefix="base_model.",
)  # fmt: skip
P_TUNING = dataclasses.replace(PROMPT_TUNING, kind="p_tuning", peft_type="P_TUNING")
PREFIX_TUNING = Codec(
    "prefix_tuning", "PREFIX_TUNING", _same, _none, _write_prefix, _read_prefix, shared=_prefix, prefix="base_model."
)
