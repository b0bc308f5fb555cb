# SPDX-License-Identifier: Apache-2.0
"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): a prompt that a small network computes.

  mlp:   prompt = linear(relu(linear(relu(linear(v)))))        v [num_tokens, d_model], trained too
  lstm:  prompt = linear(relu(linear(bilstm(v))))

The network, its sizes and its start are those of PEFT's `PromptEncoder`. It runs once per call; `jpeft.fold` evaluates
it away.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._fields import extent, names, one_of, rate
from .._method import Adapter, Folded, Method, Site, Start, Targets
from .._scope import dropout, fold_path
from ._virtual_tokens import (
    INPUTS,
    Virtual,
    apply_linear,
    chosen,
    input_targets,
    linear,
    padded,
    places,
    put_in_front,
    uniform,
    virtual,
)


@dataclasses.dataclass(frozen=True)
class PTuning(Method):
    """P-tuning, with PEFT's meanings and defaults.

    Packed rows are as of `jpeft.PromptTuning`.

    Args:
      num_tokens: length of the prompt.
      reparam: the network: `"mlp"` or `"lstm"` (bidirectional).
      hidden_size: width of its hidden layers; None for d_model.
      num_layers: layers of the LSTM; the MLP has three.
      dropout: between the layers of the LSTM, while training.
      blocks, modules_to_save: as of `jpeft.PromptTuning`.

    Example:
      >>> jpeft.PTuning(num_tokens=20, hidden_size=128)
    """

    kind: ClassVar[str] = "p_tuning"

    num_tokens: int = 20
    reparam: str = "mlp"
    hidden_size: int | None = None
    num_layers: int = 2
    dropout: float = 0.0
    blocks: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        one_of("PTuning", "reparam", self.reparam, ("mlp", "lstm"))
        for field in ("num_tokens", "num_layers", *(("hidden_size",) if self.hidden_size is not None else ())):
            extent("PTuning", field, getattr(self, field))
        rate("PTuning", "dropout", self.dropout)
        if self.reparam == "mlp" and (self.num_layers != 2 or self.dropout):
            raise ValueError("PTuning's num_layers and dropout are of the LSTM; the MLP has three layers and none")
        if self.dropout and self.num_layers == 1:
            raise ValueError("PTuning's dropout stands between layers of the LSTM, and num_layers=1 has no between")
        object.__setattr__(self, "blocks", chosen("PTuning", self.blocks, INPUTS))
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))

    def select(self, model_type: str | None) -> Targets:
        return input_targets(self.blocks, self.modules_to_save)

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start:
        inputs, d_model, _ = places(site, "input")
        embedding = jax.random.normal(fold_path(key, "embedding"), (inputs * self.num_tokens, d_model))
        leaves = {"embedding": embedding}
        for layer, d_in in enumerate(self._lstm_inputs(d_model)):
            leaves |= _lstm_start(key, layer, d_in, self._hidden(d_model))
        for layer, (d_in, d_out) in enumerate(self._linears(d_model)):
            leaves |= linear(key, f"linear_{layer}", d_in, d_out)
        return Start(leaves)

    def share(self, adapter: Any) -> Virtual:
        x = adapter.embedding[...]
        d_model = x.shape[-1]
        for layer in range(len(self._lstm_inputs(d_model))):
            if layer:
                x = dropout(x, self.dropout, f"{adapter.site.adapter}/lstm_{layer}")
            x = _bilstm(adapter, layer, x)
        last = len(self._linears(d_model)) - 1
        for layer in range(last):
            x = jax.nn.relu(apply_linear(adapter, f"linear_{layer}", x))
        return virtual(adapter, apply_linear(adapter, f"linear_{last}", x), self.num_tokens)

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return put_in_front(adapter.shared, adapter.index, base, y)

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        if adapter.site.seam != "model":
            return self, {}
        size = shapes["embedding"][0] // places(adapter.site, "input")[0]
        if self.reparam == "lstm" and size != self.num_tokens:
            raise ValueError(
                f"PTuning's LSTM reads its tokens one after another, so {self.num_tokens} cannot be padded to {size}; "
                "turn it into a plain prompt by jpeft.fold first, or use one num_tokens"
            )
        return padded(self, adapter, size)

    def fold(self, adapter: Any) -> Folded:
        prompt = self.share(adapter).tokens
        options = {"num_tokens": self.num_tokens, "blocks": self.blocks, "modules_to_save": self.modules_to_save}
        return Folded("prompt_tuning", options, Start({"prompt": prompt.reshape(-1, prompt.shape[-1])}))

    def count(self, site: Site) -> tuple[int, int]:
        if site.seam != "model":
            return 0, 0
        inputs, d_model, _ = places(site, "input")
        hidden = self._hidden(d_model)
        lstm = sum(2 * 4 * hidden * (d_in + hidden + 2) for d_in in self._lstm_inputs(d_model))
        linears = sum((d_in + 1) * d_out for d_in, d_out in self._linears(d_model))
        return inputs * self.num_tokens * d_model + lstm + linears, 0

    def _hidden(self, d_model: int) -> int:
        return self.hidden_size or d_model

    def _linears(self, d_model: int) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of every linear layer."""
        hidden = self._hidden(d_model)
        if self.reparam == "lstm":
            return (2 * hidden, 2 * hidden), (2 * hidden, d_model)
        return (d_model, hidden), (hidden, hidden), (hidden, d_model)

    def _lstm_inputs(self, d_model: int) -> tuple[int, ...]:
        """Inputs of every layer of the LSTM."""
        if self.reparam == "mlp":
            return ()
        return (d_model, *(2 * self._hidden(d_model),) * (self.num_layers - 1))


def _lstm_start(key: jax.Array, layer: int, d_in: int, hidden: int) -> dict[str, jax.Array]:
    """Both directions of a layer, uniform in ±1/sqrt(hidden); the gates stand in torch's order, i f g o."""
    shapes = {"input": (d_in, 4 * hidden), "hidden": (hidden, 4 * hidden)}
    shapes |= {"input_bias": (4 * hidden,), "hidden_bias": (4 * hidden,)}
    leaves = {f"lstm_{layer}_{name}": (2, *shape) for name, shape in shapes.items()}
    return {name: uniform(fold_path(key, name), shape, hidden) for name, shape in leaves.items()}


def _bilstm(adapter: Any, layer: int, x: Float[Array, "tokens d_in"]) -> Float[Array, "tokens d_out"]:
    """One layer: the tokens forwards and backwards, its states side by side."""
    into, again, b_into, b_again = (
        getattr(adapter, f"lstm_{layer}_{name}")[...] for name in ("input", "hidden", "input_bias", "hidden_bias")
    )
    both = jnp.stack([x, x[::-1]], 1)  # [tokens, direction, d_in]
    given = jnp.einsum("tdi,dig->tdg", both, into) + (b_into + b_again)[None]

    def step(state: tuple[jax.Array, jax.Array], gates: jax.Array) -> Any:
        h, c = state
        i, f, g, o = jnp.split(gates + jnp.einsum("dh,dhg->dg", h, again), 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(again.shape[:2], given.dtype)
    _, states = jax.lax.scan(step, (zero, zero), given)
    return jnp.concatenate([states[:, 0], states[::-1, 1]], -1)
