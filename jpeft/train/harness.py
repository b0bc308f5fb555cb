# SPDX-License-Identifier: Apache-2.0
"""A model of jpeft in EleutherAI's lm-evaluation-harness, for its tasks and their published figures.

  import lm_eval
  from jpeft.train.harness import Jpeft
  lm_eval.simple_evaluate(model=Jpeft(adapter="runs/x/adapter"), tasks=["arc_easy"])

It needs the extra `harness`, and is imported by nothing else here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from .._partition import Leaves, combine, partition
from . import saved, tokenizer
from .losses import logits_of
from .writer import Writer

#: Widths of a batch are multiples of this: a program for each.
_WIDTH = 64

Pair = tuple[list[int], list[int]]


@register_model("jpeft")
class Jpeft(LM):
    """A language model with an adapter or without.

    Args:
      model: a Hugging Face folder or an id; None is the base that the adapter names.
      adapter: a folder or an id.
      batch_size: rows at a time.
      max_length: tokens of a context with what stands behind it; None as the model's config says, else 2048.
      special_tokens: whether a text gets those that the tokenizer puts around it, as in the harness' own models.

    Raises:
      ValueError: the model is for another task than CAUSAL_LM.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        special_tokens: bool = True,
    ):
        super().__init__()
        opened = saved.open_model(model, adapter)
        if opened.model.task != "CAUSAL_LM":
            raise ValueError(f"the harness measures models for CAUSAL_LM; this one is for {opened.model.task}")
        self._words, self._special, self._rows = opened.tokenizer, special_tokens, int(batch_size)
        self._ends = tokenizer.ends(opened.base, opened.tokenizer)
        self.max_length = max_length or getattr(opened.model.config, "max_position_embeddings", None) or 2048
        self._writer = Writer(opened.model, opened.tokenizer, self._ends)
        graphdef, self._trainable, self._frozen = partition(opened.model)

        @jax.jit
        def score(trainable: Leaves, frozen: Leaves, batch: dict[str, jax.Array], targets: jax.Array) -> Any:
            logits = logits_of(combine(graphdef, trainable, frozen), batch, None)
            logp = jax.nn.log_softmax(logits.astype(jnp.float32))
            chosen = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
            counts = targets >= 0
            greedy = jnp.where(counts, logits.argmax(-1) == targets, True)
            return jnp.where(counts, chosen, 0.0).sum(-1), greedy.all(-1)

        self._score = score

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context), and whether it is what greedy would write."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each text: its log-likelihood, every token predicted once from as many before it as the model takes."""
        windows = [list(self._windows(self._encode(request.args[0]))) for request in requests]
        scores = iter(self._scored([pair for each in windows for pair in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each (context, options): what the model writes up to one of `until`, or `max_gen_toks` tokens (256)."""
        return [self._until(*request.args) for request in requests]

    def _until(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        longest = int(options.get("max_gen_toks") or 256)
        rules: dict[str, Any] = {"max_new_tokens": longest, "temperature": 0.0}
        if options.get("do_sample") or options.get("temperature"):
            rules["temperature"] = float(options.get("temperature") or 1.0)
            rules |= {name: options[name] for name in ("top_p", "top_k", "min_p") if options.get(name) is not None}
            rules["key"] = jax.random.key(int(options.get("seed") or 0))
        ids = self._encode(context)[-(self.max_length - longest) :] or [self._prefix]
        stop = [text for text in until if text]
        return "".join(piece for ((piece,),) in self._writer.stream([ids], stop=stop, **rules))

    @property
    def _prefix(self) -> int:
        """What stands before a text of which the first token is to be predicted."""
        found = self._words.bos_id if self._words.bos_id is not None else self._words.eos_id
        if found is None:
            raise ValueError(
                "the tokenizer names no token that begins or ends a text, so its first one cannot be scored"
            )
        return found

    def _encode(self, text: str) -> list[int]:
        """Ids with the special tokens, where the text does not begin with them already."""
        plain = self._words.encode_plain(text)
        if not self._special or plain[:1] == [self._words.bos_id]:
            return plain
        return self._words.encode([text])[0]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids of both, cut out of those of the whole: a token may reach over the border, and then counts as context."""
        if not context:
            ids = self._words.encode_plain(continuation)
            return ([self._prefix], ids) if ids[:1] != [self._prefix] else (ids[:1], ids[1:])
        border = len(context.rstrip())
        context, continuation = context[:border], context[border:] + continuation
        before = self._encode(context)
        return before, self._encode(context + continuation)[len(before) :]

    def _windows(self, ids: list[int]) -> Iterator[Pair]:
        """Pieces of a text with what stands before each: the first whole, of the last as much as fits in front."""
        size = self.max_length
        for start in range(0, len(ids), size):
            end = min(start + size, len(ids))
            before = ids[max(0, end - size - 1) : start] if start else [self._prefix]
            yield before, ids[start:end]

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted((i for i, pair in enumerate(pairs) if pair[1]), key=lambda i: -sum(map(len, pairs[i])))
        for at in range(0, len(order), self._rows):
            chosen = order[at : at + self._rows]
            batch, targets = self._batch([pairs[i] for i in chosen])
            sums, greedy = self._score(self._trainable, self._frozen, batch, targets)
            for i, total, is_greedy in zip(chosen, np.asarray(sums), np.asarray(greedy), strict=False):
                found[i] = float(total), bool(is_greedy)
        return found

    def _batch(self, pairs: Sequence[Pair]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs `[rows, width]`, padded behind, and the next token where it is to be scored, else -1."""
        whole = [(before + after)[-(self.max_length + 1) :] for before, after in pairs]
        width = -(-max(len(ids) - 1 for ids in whole) // _WIDTH) * _WIDTH
        ids = np.full((self._rows, width), self._words.pad_id, np.int32)
        mask, targets = np.zeros_like(ids), np.full_like(ids, -1)
        mask[:, 0] = 1  # a row of padding attends to something
        for row, (text, (_, after)) in enumerate(zip(whole, pairs, strict=True)):
            size = len(text) - 1
            ids[row, :size], mask[row, :size] = text[:-1], 1
            scored = min(len(after), size)
            targets[row, size - scored : size] = text[-scored:]
        return {"input_ids": ids, "attention_mask": mask}, targets
