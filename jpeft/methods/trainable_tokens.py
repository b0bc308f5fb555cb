# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens: some rows of an embedding table are trained, the others stay (PEFT's TRAINABLE_TOKENS).

    e(i) = rows[j]  where i = token_indices[j],  else the base's row i        rows [tokens, d_model]

The rows start as the base's, exactly the base. A head that is tied to the table reads the same rows. As in torch, the
models of the zoo train no vector of the padding token at the input.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import seams
from .._fields import selection, token_ids
from .._method import Method, Site, Start, Targets, wide

#: The table of the input's tokens, by the model's type.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), ("embed_tokens",)
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta-v2", "distilbert"), ("word_embeddings",)),
    "gpt2": ("wte",),
    "t5": ("shared",),
}


@dataclasses.dataclass(frozen=True)
class TrainableTokens(Method):
    """Rows of an embedding table: new tokens, or old ones with a new meaning.

    Args:
      token_indices: ids of the tokens to train, each once.
      targets: the table, as of `jpeft.LoRA`; None for the input's by the model's type.
      exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.TrainableTokens(tokenizer.convert_tokens_to_ids(["<call>", "</call>"]))
    """

    kind: ClassVar[str] = "trainable_tokens"

    token_indices: Any
    targets: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)
        object.__setattr__(self, "token_indices", token_ids("TrainableTokens", self.token_indices))

    def select(self, model_type: str | None) -> Targets:
        if self.targets is None and model_type not in DEFAULT_TARGETS:
            raise ValueError(
                f"TrainableTokens knows no table of model type {model_type!r} (it does of "
                f"{', '.join(DEFAULT_TARGETS)}); pass targets="
            )
        targets = DEFAULT_TARGETS[str(model_type)] if self.targets is None else self.targets
        return Targets(targets, self.exclude, None, self.modules_to_save)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        projection = seams.projection(base)
        if not isinstance(projection, seams.Lookup):
            raise ValueError(f"TrainableTokens trains rows of an embedding table, which {site.path} is not")
        outside = [token for token in self.token_indices if token >= site.d_in]
        if outside:
            raise ValueError(f"{site.path} has {site.d_in} rows, so there is no token {outside[0]}; enlarge it first")
        self._check_first(site, base)
        return Start({"rows": self._own(projection.read(base))})

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        ids, tokens = jnp.asarray(inputs[0]), np.asarray(self.token_indices)
        order = np.argsort(tokens)
        place = jnp.minimum(jnp.searchsorted(tokens[order], ids), len(tokens) - 1)
        trained = (jnp.asarray(tokens[order])[place] == ids)[..., None]
        rows = self._running(adapter, base)[jnp.asarray(order)[place]]
        return jnp.where(trained, seams.held(rows.astype(y.dtype), ids, base), y)

    def attend(self, adapter: Any, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        rows = self._running(adapter, base)
        change = rows - self._own(seams.projection(base).read(base)).astype(rows.dtype)
        more = query.astype(change.dtype) @ change.T
        return y.at[..., np.asarray(self.token_indices)].add(more.astype(y.dtype))

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        table = projection.read(base)
        active = jnp.asarray(site.active).reshape(*site.lead, 1, 1)
        rows = jnp.where(active, adapter.rows[...], self._own(table))
        return {projection.kernel: table.astype(rows.dtype).at[..., np.asarray(self.token_indices), :].set(rows)}

    def depends_on_layer(self, site: Site) -> bool:
        return not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        number = sum(site.active) * len(self.token_indices) * site.d_out
        return number, number

    def _own(self, table: jax.Array) -> jax.Array:
        """The tokens' rows of `table`, in the adapters' precision."""
        return table[..., np.asarray(self.token_indices), :].astype(wide(table.dtype))

    def _running(self, adapter: Any, base: Any) -> jax.Array:
        """The rows of the running layer; the base's where it is not adapted."""
        rows, active = adapter.rows[...], adapter.site.active
        if all(active):
            return rows
        return jnp.where(jnp.asarray(active)[adapter.layer], rows, self._own(seams.projection(base).read(base)))

    def _check_first(self, site: Site, base: Any) -> None:
        """A row is replaced whole, so nothing may have changed the table before."""
        for name, other in getattr(base, "adapters", {}).items():
            theirs = getattr(other.method, "token_indices", None)
            again = sorted({*self.token_indices} & {*(theirs or ())})
            if again:
                raise ValueError(f"the adapter {name!r} trains the row of token {again[0]} in {site.path} already")
            if theirs is None and other.acts:
                raise ValueError(
                    f"TrainableTokens replaces rows of {site.path}, and with them what the adapter {name!r} changed; "
                    "put it on the model before the others"
                )
