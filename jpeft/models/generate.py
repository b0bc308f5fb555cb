# SPDX-License-Identifier: Apache-2.0
"""Generation: a prompt is read into a cache at once, and each further token costs one step, in one compiled loop.

Works for every model of the zoo that has a cache, plain or adapted, and under `jpeft.apply_bank` with an adapter for
every row. Methods act as they do without a cache: virtual tokens are read once with the prompt, a prefix stands in
front of every step's keys, and what acts on a prompt's ends (LoReFT) acts on those of the text that is given.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped

from ._beams import Scoring, Search, searched
from ._prompt import Prompt, prepared
from ._sampling import Rules, rules
from ._writing import How, State, advanced, begun

#: The tasks whose models write.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `generate` and `stream` take beside a model and prompts; checked when it is made.

    Attributes:
      max_new_tokens: how many tokens are written at most. Another number is another program.
      temperature: 0 takes the likeliest token; else tokens are drawn by softmax(logits / temperature).
      top_k: draw among the k likeliest.
      top_p: draw among the likeliest whose probabilities sum to p.
      min_p: draw among those that are p times as probable as the likeliest.
      repetition_penalty: divides the logits of what the text holds already (multiplies them where negative).
      eos_token_id: what ends a row, one id or several; None writes max_new_tokens.
      pad_token_id: what fills up a row that has ended; None is the config's, or else the first of `eos_token_id`.
      key: for drawing: one key, of which row i draws by `fold_in(key, i)`, or one for every row, `[batch]`. What a row
        draws depends on its key and its logits alone. Of several texts of a row, j draws by `fold_in(key of the row,
        j)`; or give a key for each, `[batch, texts]`.
      num_return_sequences: how many texts are written for each prompt, which is read once; they get an axis of their
        own. None writes one, without the axis.
      num_beams: above 1, the likeliest text is searched among this many partial ones.
      length_penalty: of a search, 1 by default: texts are compared by Σ log p / length ** length_penalty, so above 0
        favours long ones.
      early_stopping: of a search, False by default: True stops when `num_beams` texts have ended; False when no text of
        the length reached would be better; "never" when none could be.
      suppress_tokens: ids that are never written.
      begin_suppress_tokens: ids that are not written first.
      decoder_input_ids: of a model with an encoder, `[batch, seq]` that its decoder has written already, from the start
        token on, such as Whisper's language and task; None is the start token.
      bucket: prompts are padded to a multiple of this length, so that other lengths need no other program.
      rules: of choosing a token, made of the options.

    Raises:
      ValueError: a number is out of its range, or an option would change nothing beside the others.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    key: Any = None
    num_return_sequences: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    decoder_input_ids: Any = None
    bucket: int = 64
    rules: Rules = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = 1 if self.num_return_sequences is None else self.num_return_sequences
        for name in ("max_new_tokens", "num_return_sequences", "num_beams", "bucket"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name} is a whole number, 1 or more, got {value}")
        if self.num_beams == 1:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is a rule of a search, which needs num_beams above 1"
                    )
            if texts > 1 and not self.temperature:
                raise ValueError(
                    f"num_return_sequences={texts} of temperature=0 would be one text {texts} times; draw them "
                    "(temperature) or search for them (num_beams)"
                )
        elif self.temperature:
            raise ValueError(f"num_beams={self.num_beams} searches for the likeliest text, and temperature draws one")
        elif texts > self.num_beams:
            raise ValueError(f"a search with num_beams={self.num_beams} ends with as many texts, not with {texts}")
        if self.early_stopping not in (None, True, False, "never"):
            raise ValueError(f"early_stopping is True, False or 'never', got {self.early_stopping!r}")
        banned = self.suppress_tokens, self.begin_suppress_tokens
        chosen = rules(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, *banned)
        object.__setattr__(self, "rules", chosen)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return () if self.eos_token_id is None else tuple(np.atleast_1d(np.asarray(self.eos_token_id)).tolist())

    def keys(self, batch: int) -> Any:
        """A key for every text, `[batch · texts]`, or None where nothing is drawn."""
        if not self.temperature:
            return None
        key, texts = self.key, self.num_return_sequences
        if key is None:
            raise ValueError("tokens are drawn where temperature is above 0, which needs key=jax.random.key(seed)")
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(f"key is made by jax.random.key(seed), or by split of one; got an array of {key.dtype}")
        if key.ndim == 0:
            key = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
        if key.shape == (batch,) and texts is not None:
            fold = jax.vmap(jax.random.fold_in, (None, 0))
            key = jax.vmap(fold, (0, None))(key, jnp.arange(texts))
        if key.shape != (batch,) + (() if texts is None else (texts,)):
            each = "" if texts is None else f", or [{batch}, {texts}]: one for each of the texts"
            raise ValueError(f"key is one key, or one for each of the {batch} rows{each}; got {key.shape}")
        return key.reshape(-1)


def generate(
    model: Any,
    input_ids: Shaped[Any, "batch ..."],
    attention_mask: Shaped[Any, "batch seq"] | None = None,
    **options: Any,
) -> Int[Array, "batch *texts new"]:
    """What the model writes after each prompt: `[batch, max_new_tokens]` ids, without the prompt.

    A row that has ended is filled up with padding, and the loop stops when all rows have. Positions count the tokens
    of a prompt alone, so padding on any side changes nothing. One program serves all prompts of a bucket of lengths.

    Args:
      model: of a task in `TASKS`; adapted or not.
      input_ids: prompts; of an encoder with a decoder, what the encoder reads: tokens, or Whisper's `input_features`.
      attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
      **options: `max_new_tokens`, and the others of `Options`. With `num_return_sequences` the ids are `[batch,
        num_return_sequences, max_new_tokens]`; those of a search stand the best first.

    Raises:
      ValueError: the model has no cache; a row has no token; more tokens than the model has positions; wrong options.

    Example:
      >>> ids = jpeft.models.generate(model, prompt, max_new_tokens=32, temperature=0.8, top_p=0.95, key=key)
    """
    call = _call(model, input_ids, attention_mask, Options(**options))
    told = call.options
    if told.num_beams > 1:
        early = False if told.early_stopping is None else told.early_stopping
        penalty = 1.0 if told.length_penalty is None else told.length_penalty
        banned = told.rules.suppress, told.rules.begin_suppress
        scoring = Scoring(penalty, told.repetition_penalty, call.how.ends, call.how.pad, *banned)
        search = Search(told.num_beams, early)
        ids = _search(call.graphdef, told.max_new_tokens, search, call.leaves, call.prompt, scoring)
        return ids[:, 0] if told.num_return_sequences is None else ids[:, : told.num_return_sequences]
    return call.shaped(_write(*call.sizes, call.leaves, call.prompt, call.how))


def stream(
    model: Any,
    input_ids: Shaped[Any, "batch ..."],
    attention_mask: Shaped[Any, "batch seq"] | None = None,
    *,
    chunk: int = 8,
    **options: Any,
) -> Iterator[Int[np.ndarray, "batch *texts some"]]:
    """As `generate`, token by token or by `chunk` of them: each is given when it is there, until all rows have ended.

    Joined on their last axis they are the ids of `generate`, without the padding behind the last row's end. Leaving
    the iterator early leaves the rest unwritten. Two programs serve all prompts of a bucket and all sizes of a chunk.

    Args:
      model, input_ids, attention_mask: as of `generate`.
      chunk: tokens at a time; each costs one call to the device.
      **options: as of `generate`; a search (`num_beams`) knows its text at its end alone, and is refused.

    Raises:
      ValueError: as `generate`.

    Example:
      >>> for ids in jpeft.models.stream(model, prompt, max_new_tokens=32, chunk=1):
      ...     print(ids[0])
    """
    told = Options(**options)
    if chunk != int(chunk) or chunk < 1:
        raise ValueError(f"chunk is a number of tokens, 1 or more, got {chunk}")
    if told.num_beams > 1:
        raise ValueError(f"num_beams={told.num_beams} finds its text at the end alone; stream what is drawn or greedy")
    return _chunks(_call(model, input_ids, attention_mask, told), chunk)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call made ready: the model as NNX's graphdef and leaves, and what it is to do."""

    graphdef: Any
    leaves: Any
    prompt: Prompt
    how: How
    options: Options

    @property
    def sizes(self) -> tuple[Any, int, int]:
        """What a program is compiled for."""
        return self.graphdef, self.options.max_new_tokens, self.options.num_return_sequences or 1

    def shaped(self, ids: Any) -> Any:
        """`[batch · texts, new]` with the texts on an axis of their own, if they were asked for."""
        texts = self.options.num_return_sequences
        return ids if texts is None else ids.reshape(-1, texts, ids.shape[-1])


def _call(model: Any, input_ids: Any, attention_mask: Any, options: Options) -> _Call:
    if getattr(model, "task", None) not in TASKS or not hasattr(model, "prefill"):
        raise ValueError(
            f"generate takes a model with a cache and a task that writes ({', '.join(TASKS)}); got "
            f"{type(model).__name__} with the task {getattr(model, 'task', None)}"
        )
    vocab, banned = model.config.vocab_size, (options.rules.suppress, options.rules.begin_suppress)
    if any(ids is not None and ids.size and ids.max() >= vocab for ids in banned):
        raise ValueError(f"suppressed tokens are below {vocab}, the size of the vocabulary; got {[*banned]}")
    given = options.max_new_tokens, options.bucket, options.decoder_input_ids
    prompt = prepared(model, jnp.asarray(input_ids), attention_mask, *given)
    pad = _pad(model, options)
    ends = jnp.asarray(options.ends, jnp.int32)
    how = How(options.rules, options.keys(len(prompt.ids)), ends, jnp.asarray(pad, jnp.int32))
    graphdef, flat = nnx.graph.flatten(model)
    return _Call(graphdef, [leaf.get_value() for leaf in flat.leaves], prompt, how, options)


def _pad(model: Any, options: Options) -> int:
    """What stands behind the end of a row; where there is no end, anything."""
    given = (options.pad_token_id, getattr(model.config, "pad_token_id", None), *options.ends, 0)
    return next(pad for pad in given if pad is not None)


def _chunks(call: _Call, size: int) -> Iterator[np.ndarray]:
    """The ids of a call, some at a time; what was written stays on the device until it is given."""
    state, given = _begin(*call.sizes, call.leaves, call.prompt, call.how), 0
    while True:
        until = min(given + size, call.options.max_new_tokens)
        state = _advance(call.graphdef, call.leaves, state, jnp.asarray(until, jnp.int32), call.how)
        count = int(state.count)
        if count > given:
            yield call.shaped(_at_hand(state.ids)[:, given:count])
        if count < until or count == call.options.max_new_tokens:
            return
        given = count


def _at_hand(ids: jax.Array) -> np.ndarray:
    """The ids of all rows, where several processes hold them as well, all of which then call this."""
    if ids.is_fully_addressable or ids.is_fully_replicated:
        return np.asarray(ids)
    return np.asarray(multihost_utils.process_allgather(ids, tiled=True))


# Programs -----------------------------------------------------------------------------------------------------------


def _writes(graphdef: Any, new: int, texts: int, leaves: Any, prompt: Prompt, how: How) -> Int[Array, "rows new"]:
    model = nnx.graph.unflatten(graphdef, leaves)
    return advanced(model, begun(model, prompt, new, texts, how), new, how).ids


def _begins(graphdef: Any, new: int, texts: int, leaves: Any, prompt: Prompt, how: How) -> State:
    return begun(nnx.graph.unflatten(graphdef, leaves), prompt, new, texts, how)


def _advances(graphdef: Any, leaves: Any, state: State, until: jax.Array, how: How) -> State:
    return advanced(nnx.graph.unflatten(graphdef, leaves), state, until, how)


def _searches(
    graphdef: Any, new: int, search: Search, leaves: Any, prompt: Prompt, scoring: Scoring
) -> Int[Array, "batch beams new"]:
    return searched(nnx.graph.unflatten(graphdef, leaves), prompt, new, search, scoring)


_write = jax.jit(_writes, static_argnums=(0, 1, 2))
_begin = jax.jit(_begins, static_argnums=(0, 1, 2))
_advance = jax.jit(_advances, static_argnums=0, donate_argnums=2)
_search = jax.jit(_searches, static_argnums=(0, 1, 2))
