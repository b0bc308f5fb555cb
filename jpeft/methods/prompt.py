# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): trained vectors in front of the input.

  e' = [prompt; e]        prompt [num_tokens, d_model]

The prompt goes where word embeddings go, as in PEFT: position and token type embeddings, and norms, act on it too. The
text stands behind it: its positions go up by num_tokens. (AdapterHub puts it after them, which on BERT is another
model.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .. import seams
from .._fields import extent, is_list, names, one_of, whole
from .._method import Adapter, Method, Site, Start, Targets
from .._scope import fold_path
from ._virtual_tokens import INPUTS, Virtual, chosen, input_targets, padded, places, put_in_front, virtual

#: Where the first prompt comes from, and whether `token_ids` says more.
STARTS = {"random": False, "uniform": False, "vocabulary": False, "text": True, "class_labels": True}


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning: vectors that are trained in front of every input.

    On a causal model the prompt sees itself alone, so one serves all the examples of a packed row, exactly. On a
    bidirectional one each example has a copy (`jpeft.max_segments`).

    Args:
      num_tokens: length of the prompt.
      init: `"random"` (normal, std 1, as PEFT), `"uniform"` (in ±0.5, as the paper), `"vocabulary"` (rows of the word
        table, drawn), `"text"` (the rows of `token_ids`, repeated or cut to num_tokens), `"class_labels"` (the rows of
        `token_ids`, those of a label of several tokens averaged; the rest drawn from the table).
      token_ids: of a text, or one per class: an id, or several of one label. Tokenizers are left to the caller.
      blocks: whose input: `"encoder"`, `"decoder"`, or both, with a prompt each. None is the encoder's and, in a model
        without one, the decoder's.
      modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> ids = tokenizer("Classify the sentiment of this review:")["input_ids"]
      >>> jpeft.PromptTuning(num_tokens=20, init="text", token_ids=ids)
    """

    kind: ClassVar[str] = "prompt_tuning"

    num_tokens: int = 20
    init: str = "random"
    token_ids: Any = ()
    blocks: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        extent("PromptTuning", "num_tokens", self.num_tokens)
        one_of("PromptTuning", "init", self.init, STARTS)
        if not is_list(self.token_ids):
            raise ValueError(
                f"PromptTuning's token_ids are a list of ids, as a tokenizer gives, got {self.token_ids!r}"
            )
        ids = tuple(tuple(i) if isinstance(i, Iterable) else i for i in self.token_ids)
        for i in ids:
            for part in i if isinstance(i, tuple) and i and self.init == "class_labels" else (i,):
                whole("PromptTuning", "token_ids", part, least=0)
        if STARTS[self.init] != bool(ids):
            wrong = "needs token_ids=" if STARTS[self.init] else "takes no token_ids="
            raise ValueError(f"PromptTuning's init={self.init!r} {wrong}")
        if self.init == "class_labels" and len(ids) > self.num_tokens:
            raise ValueError(f"{len(ids)} class labels need as many tokens, got num_tokens={self.num_tokens}")
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "blocks", chosen("PromptTuning", self.blocks, INPUTS))
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))

    def select(self, model_type: str | None) -> Targets:
        return input_targets(self.blocks, self.modules_to_save)

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start:
        inputs, d_model, _ = places(site, "input")
        count = inputs * self.num_tokens
        if self.init == "random":
            return Start({"prompt": jax.random.normal(key, (count, d_model))})
        if self.init == "uniform":
            return Start({"prompt": jax.random.uniform(key, (count, d_model), minval=-0.5, maxval=0.5)})
        table = word_table(model, d_model)
        known = [i for ids in self.token_ids for i in (ids if isinstance(ids, tuple) else (ids,))]
        if max(known, default=0) >= len(table):
            raise ValueError(f"token_ids holds {max(known)}, and the model's word table has {len(table)} rows")
        rows = [table[jnp.asarray(ids)].reshape(-1, d_model).mean(0) for ids in self.token_ids]
        if self.init == "text":
            rows = [rows[i % len(rows)] for i in range(count)]
        drawn = table[jax.random.randint(fold_path(key, "drawn"), (count - len(rows),), 0, len(table))]
        return Start({"prompt": jnp.concatenate([*(row[None] for row in rows), drawn])})

    def share(self, adapter: Any) -> Virtual:
        return virtual(adapter, adapter.prompt[...], self.num_tokens)

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return put_in_front(adapter.shared, adapter.index, base, y)

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        if adapter.site.seam != "model":
            return self, {}
        return padded(self, adapter, shapes["prompt"][0] // places(adapter.site, "input")[0])

    def count(self, site: Site) -> tuple[int, int]:
        if site.seam != "model":
            return 0, 0
        inputs, d_model, _ = places(site, "input")
        return inputs * self.num_tokens * d_model, 0


def word_table(model: Any, d_model: int) -> Float[Array, "vocab d_model"]:
    """The vectors of the words: the model's one table of d_model columns or, of several, the one of vocab_size rows.

    They are as the layers read them: multiplied with config.embedding_scale, where there is one.

    Raises:
      ValueError: it cannot be told.
    """
    found: dict[str, jax.Array] = {}
    for path, module in nnx.iter_modules(model):
        seam = seams.projection(module) if seams.kind(module) == "projection" else None
        if isinstance(seam, seams.Lookup) and seam.dims(module)[::2] == ((), d_model):
            found["/".join(map(str, path))] = seam.read(module)
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    tables = [table for table in found.values() if len(found) == 1 or len(table) == vocab]
    if len(tables) != 1:
        raise ValueError(
            f"the words' vectors are one of {', '.join(found) or 'none'}, and config.vocab_size={vocab} does not tell "
            "which; start with init='random' and set the trainable leaf 'prompt' yourself"
        )
    scale = getattr(getattr(model, "config", None), "embedding_scale", None)
    return tables[0].astype(jnp.float32) * (1 if scale is None else jnp.asarray(scale, tables[0].dtype))
