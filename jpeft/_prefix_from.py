# SPDX-License-Identifier: Apache-2.0
"""A prefix that starts as a text: the keys and values that the model itself has of it.

In a causal model whose text moves up behind the prefix (`shift_positions=True`), and whose attention has no window and
no bias of its own, the adapted model computes of a text what the base computes of it behind that other text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._adapt import adapt
from ._graft import adapters
from ._method import Method, Site, Start, Targets
from ._observed import Run, called, gathered, watched
from ._walk import modules


def prefix_from(
    model: nnx.Module,
    method: Any,
    text: Any,
    *,
    key: jax.Array,
    run: Run | None = None,
    name: str | None = None,
) -> Any:
    """`model` adapted by a prefix that starts as the keys and values of `text`, of every layer.

    A new model. What the given one's adapters do to keys and values counts in.

    Args:
      method: `jpeft.PrefixTuning` without a projection; `num_tokens` is how many tokens `text` has.
      text: one row of ids, `[1, num_tokens]`, or the model's arguments by name. An encoder-decoder takes as many
        `decoder_input_ids`.
      key: as of `jpeft.adapt`.
      run: (model, text) -> outputs; by default the text is the model's only argument, or holds them by name.
      name: as of `jpeft.adapt`.

    Raises:
      TypeError, ValueError: another method; a projection, or another start; a text of several rows, with padding, or of
        another length.

    Example:
      >>> ids = tokenizer("Answer in one word.", return_tensors="np").input_ids
      >>> method = jpeft.PrefixTuning(num_tokens=ids.shape[1], shift_positions=True)
      >>> model = jpeft.prefix_from(model, method, ids, key=jax.random.key(0))
    """
    _check(method)
    text = _tokens(text) if run is None else text
    probed = adapt(model, _Recorded(method), key=key)
    found, _ = gathered(probed, [text], run or called)
    adapted = adapt(model, method, key=key, name=name)
    root: Any = adapters(adapted)[name or method.kind]
    leaf = root.prefix
    table = np.array(leaf[...])
    for module in modules(probed):
        recorder = adapters(module.module).get(_Recorded.kind)
        if recorder is not None and recorder.acts:
            site = recorder.site
            tokens = found[f"{module.path}/adapters/{_Recorded.kind}/record".lstrip("/")]
            for i, layer in enumerate(tokens.reshape(len(site.names), *tokens.shape[len(site.lead) :])):
                at = 2 * (site.first + i)
                table[:, at : at + 2] = layer
    leaf.set_value(jnp.asarray(table, leaf.dtype))
    return adapted


@dataclasses.dataclass(frozen=True)
class _Recorded(Method):
    """Leaves all as it is; the gradient of `record` `[*lead, tokens, 2, kv_heads, d_head]` is keys and values."""

    kind: ClassVar[str] = "recorded"

    of: Any

    def select(self, model_type: str | None) -> Targets:
        return dataclasses.replace(self.of.select(model_type)[0], modules_to_save=())

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        shape = (*site.lead, self.of.num_tokens, 2, site.heads, site.d_out // site.heads)
        return Start({"record": jnp.zeros(shape, jnp.float32)})

    def after(self, adapter: Any, base: Any, y: Any, *inputs: Any) -> Any:
        k, v, mask = y
        record = adapter.record[...]
        if k.shape[:2] != (1, len(record)):
            raise ValueError(
                f"{adapter.site.path} has {k.shape[1]} keys in {k.shape[0]} rows, and a prefix of {len(record)} tokens "
                "starts as one row of as many; give a text of num_tokens tokens to a model without another prefix or "
                "prompt"
            )
        both = jnp.stack([k[0], v[0]], 1).astype(record.dtype)
        return watched(k, both, record), v, mask

    def count(self, site: Site) -> tuple[int, int]:
        return sum(site.active) * 2 * self.of.num_tokens * site.d_out, 0


def _check(method: Any) -> None:
    if getattr(method, "kind", None) != "prefix_tuning":
        raise TypeError(f"prefix_from starts a jpeft.PrefixTuning, got {type(method).__name__}")
    if method.projection:
        raise ValueError(
            "the keys and values of a prefix with projection=True are computed by a network, which cannot start as "
            "those of a text; pass projection=False"
        )
    if method.init != "normal":
        raise ValueError(f"prefix_from is a start itself, so the method's init must be 'normal', got {method.init!r}")


def _tokens(text: Any) -> Any:
    """The text as arrays.

    Raises:
      TypeError, ValueError: it is no row of ids, or has padding.
    """
    if not isinstance(text, Mapping):
        ids = np.asarray(text)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(
                "text is one row of ids, [1, num_tokens], or the model's arguments by name; got "
                f"{type(text).__name__} of shape {ids.shape} and {ids.dtype}"
            )
        return ids
    found = {name: value if value is None else np.asarray(value) for name, value in text.items()}
    for name, mask in found.items():
        if name.endswith("attention_mask") and mask is not None and not (mask != 0).all():
            raise ValueError(f"the text has padding ({name} holds 0), and a prefix has none; give its tokens alone")
    return found
