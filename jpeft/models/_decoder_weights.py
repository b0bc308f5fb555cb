# SPDX-License-Identifier: Apache-2.0
"""What the leaves of a decoder with rotary embedding are called in transformers, and the head of each of its tasks."""

from collections.abc import Sequence

from ._decoder_config import DecoderConfig
from ._table import TRANSPOSE, Entry, Ignore, Rule, Tied

#: Modules that some tasks have and others lack.
HEADS = ("lm_head", "score", "qa_outputs")


def head_of(config: DecoderConfig, task: str) -> tuple[str, ...]:
    """The task's output layer; none where it is tied to the embedding, or the task is to give states."""
    if task == "CAUSAL_LM":
        return () if config.tie_word_embeddings else ("lm_head",)
    return {"SEQ_CLS": ("score",), "TOKEN_CLS": ("score",), "QUESTION_ANS": ("qa_outputs",)}.get(task, ())


def head_size(config: DecoderConfig, task: str) -> tuple[int, bool]:
    """Outputs of the head, and whether it has a bias."""
    return {
        "CAUSAL_LM": (config.vocab_size, False),
        "SEQ_CLS": (config.num_labels, False),
        "TOKEN_CLS": (config.num_labels, config.token_classification_bias),
        "QUESTION_ANS": (2, True),
    }[task]


def decoder_weights(
    config: DecoderConfig, task: str, prefix: str, norms: Sequence[str], *, mlp: bool = True
) -> tuple[Entry, ...]:
    """The table of weights.

    Args:
      config: tells which projections and head norms there are.
      task: tells the head.
      prefix: what transformers puts before the backbone's names.
      norms: a layer's, but for those of heads.
      mlp: whether a layer has the MLP of most families.
    """
    entries: list[Entry] = [Rule(f"{prefix}embed_tokens.weight", "embed_tokens/embedding")]
    for name, bias in _linears(config, mlp):
        entries += _linear_rules(f"{prefix}layers.{{i}}.{name}", f"layers/{name.replace('.', '/')}", bias)
    for name in [*(("self_attn.q_norm", "self_attn.k_norm") if config.head_norms else ()), *norms]:
        entries.append(Rule(f"{prefix}layers.{{i}}.{name}.weight", f"layers/{name.replace('.', '/')}/scale"))
    entries += [Rule(f"{prefix}norm.weight", "norm/scale"), Ignore("...rotary_emb.inv_freq")]
    for head in head_of(config, task):
        entries += _linear_rules(head, head, head_size(config, task)[1])
    if task == "CAUSAL_LM" and config.tie_word_embeddings:
        entries.append(Tied("lm_head.weight", "embed_tokens/embedding"))
    return tuple(entries)


def _linears(config: DecoderConfig, mlp: bool) -> list[tuple[str, bool]]:
    """A layer's projections, and whether they have a bias."""
    bias, o_bias, mlp_bias = config.biases
    qkv = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
    gated = ("gate_up_proj", "down_proj") if config.fused else ("gate_proj", "up_proj", "down_proj")
    attention = [*((f"self_attn.{name}", bias) for name in qkv), ("self_attn.o_proj", o_bias)]
    return [*attention, *((f"mlp.{name}", mlp_bias) for name in gated if mlp)]


def _linear_rules(hf: str, path: str, bias: bool) -> list[Entry]:
    kernel = Rule(f"{hf}.weight", f"{path}/kernel", TRANSPOSE)
    return [kernel, Rule(f"{hf}.bias", f"{path}/bias")] if bias else [kernel]
