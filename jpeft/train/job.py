# SPDX-License-Identifier: Apache-2.0
"""A configuration made real: data as batches, and the adapted model as arrays in their places."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from .. import _mesh, models
from .._adapt import adapt
from .._partition import GraphDef, Leaves, partition
from .._quantize import quantize
from .._sharding import placement, shard
from .._summary import Summary, summary
from ..models._checkpoint import read_config
from ..models._hub import model_folder
from . import config as configuration
from . import data, tokenizer
from .config import Config
from .data import Batches
from .encoding import Encoder
from .packing import Packs
from .preference import with_reference
from .saved import no_form_in_peft
from .streaming import Streamed, stream


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains and is evaluated on.

    Attributes:
      tokenizer: of the model's folder.
      label_names: in the order of the head's outputs; None for a language model.
      train: batches of one update each; of a stream those of its first window.
      eval: batches of one evaluation, or None.
      num_updates: updates of the whole run.
      stream: what is trained on in the place of `train`, where rows are not all held.
      template: that made the conversations text, in jinja; None where there are none.
    """

    tokenizer: tokenizer.Tokenizer
    label_names: tuple[str, ...] | None
    train: Batches
    eval: Batches | None
    num_updates: int
    stream: Streamed | None = None
    template: str | None = None

    @property
    def feed(self) -> Batches | Streamed:
        """What the training walks through."""
        return self.train if self.stream is None else self.stream

    def epochs(self, updates: int) -> float | None:
        """Passes over the data that so many updates are; None of a stream."""
        return None if self.stream is not None else round(updates / self.train.buckets.num_batches, 4)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every data file."""
        return self.train.examples.digests | (self.eval.examples.digests if self.eval else {})


@dataclasses.dataclass(frozen=True)
class Parts:
    """The adapted model, partitioned.

    Attributes:
      graphdef, trainable, frozen: of `jpeft.partition`.
      summary: its counts.
      own_format: why the adapter will be saved in jpeft's own format and not in PEFT's; None where PEFT's holds it.
    """

    graphdef: GraphDef
    trainable: Leaves
    frozen: Leaves
    summary: Summary
    own_format: str | None


def read_data(config: Config) -> Dataset:
    """Reads and tokenises the data of a configuration.

    Raises:
      FileNotFoundError, DataError: see `data`.
    """
    words, options = tokenizer.load(model_folder(config.model.path)), config.data
    task = "PREFERENCE" if config.train.objective == "dpo" else config.model.task
    rows = data.read_rows(options, task, "train")
    names = None
    if task in configuration.CLASSIFYING:
        names = options.label_names or data.label_names(rows)
    shape = {"batch_size": config.train.batch_size, "accumulation": config.train.accumulation, "pad_id": words.pad_id}
    streamed = None
    if options.streaming:
        streamed = stream(rows, options, Encoder(options, words, names), **shape)
        train = streamed.first
    else:
        examples = data.encode(rows, options, words, names, config.train.seed)
        fixed = {name: getattr(options, name) for name in ("max_length", "max_target", "num_widths", "packing")}
        train = data.make_batches(examples, **shape, **fixed)
    held = None
    if configuration.paths(options.eval):
        held = data.batches_like(train, data.encode(data.read_rows(options, task, "eval"), options, words, names))
    updates = config.train.max_steps or (config.train.epochs or 1) * train.buckets.num_batches
    spoken = Encoder(options, words, names).spoken([part.reader for part in rows])
    return Dataset(words, names, train, held, updates, streamed, spoken and spoken.source)


def with_references(dataset: Dataset, parts: Parts, mesh: Mesh | None) -> Dataset:
    """The same data with the reference's log-probabilities beside every pair."""
    leaves = parts.graphdef, parts.trainable, parts.frozen
    held = None if dataset.eval is None else with_reference(dataset.eval, *leaves, mesh)
    return dataclasses.replace(dataset, train=with_reference(dataset.train, *leaves, mesh), eval=held)


def make_mesh(config: Config) -> Mesh | None:
    """The mesh that a configuration names, which must divide its batch.

    Raises:
      ValueError: it does not fit the devices, or the batch.
    """
    if config.mesh is None:
        return None
    mesh = _mesh.mesh(config.mesh)
    _mesh.local_rows(mesh, config.train.batch_size)
    return mesh


def build(config: Config, label_names: tuple[str, ...] | None, mesh: Mesh | None) -> Parts:
    """Loads the base, puts the method on it, and every leaf in its place.

    Raises:
      FileNotFoundError, CheckpointError, ConfigError, ValueError: the folder or the method is not right.
    """
    method = configuration.method(config.method)
    model = adapt(load_base(config, label_names, mesh), method, key=start_key(config))
    counts, reason = summary(model), no_form_in_peft(model)
    return Parts(*partition(model if mesh is None else shard(model, mesh)), counts, reason)


def load_base(config: Config, label_names: tuple[str, ...] | None, mesh: Mesh | None = None) -> Any:
    """The base model, with a new head where it needs one. Raises as `models.load`."""
    return models.load(
        config.model.path,
        config.model.task,
        config.model.dtype,
        key=jax.random.fold_in(jax.random.key(config.train.seed), 0),
        num_labels=None if label_names is None else len(label_names),
        remat=config.model.remat,
        sharding=None if mesh is None else placement(mesh),
        quantize=config.model.quantize,
    )


def by_shape(config: Config, label_names: tuple[str, ...] | None) -> Any:
    """The adapted model with shapes in the place of arrays: no weights are read, and nothing is allocated."""
    method, key = configuration.method(config.method), jax.random.key(0)
    hf, num_labels = read_config(model_folder(config.model.path)), None if label_names is None else len(label_names)

    def adapted() -> Any:
        kept = {"dtype": jnp.dtype(dtype_of(config)), "remat": config.model.remat}
        base = models.build(hf, config.model.task, key=key, num_labels=num_labels, **kept)
        scheme = config.model.quantize
        return adapt(base if scheme is None else quantize(base, scheme), method, key=key)

    return nnx.eval_shape(adapted)


def dtype_of(config: Config) -> str:
    """The base's dtype: as configured, else its checkpoint's."""
    hf = read_config(model_folder(config.model.path))
    return config.model.dtype or hf.get("dtype") or hf.get("torch_dtype") or "float32"


def start_key(config: Config) -> jax.Array:
    """The key of the adapter's first values."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 1)


def dropout_key(config: Config) -> jax.Array | None:
    """The key of a run's dropout, or None where it is off."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 2) if config.train.dropout else None


def describe(config: Config, dataset: Dataset) -> str:
    """What will be trained on, in lines."""
    real, padded = map(
        sum, zip(*map(dataset.train.sizes, dataset.train.buckets.epoch(config.train.seed, 0)), strict=True)
    )
    lines = [f"train: {'' if dataset.stream is None else 'the first window: '}{dataset.train.examples}"]
    if dataset.eval:
        lines.append(f"eval:  {dataset.eval.examples}")
    if dataset.label_names:
        lines.append(f"labels: {', '.join(dataset.label_names)}")
    shapes = dataset.train.buckets
    if isinstance(shapes, Packs):
        beside = "" if shapes.targets is None else f" and {shapes.target_width} of targets"
        padded_to = f"{shapes.width} tokens{beside}, packed with up to {shapes.most} examples"
    else:
        padded_to = f"one of {', '.join(map(str, shapes.widths))} tokens, padded"
    lines += [
        f"batches of {config.train.batch_size} x {config.train.accumulation} rows of {padded_to};"
        f" {100 * real / padded:.1f} % of what is computed is real",
        f"{dataset.num_updates:,} updates, {shapes.num_batches:,} an epoch; at most {len(shapes.widths)} compilations",
    ]
    if dataset.train.examples.unended and dataset.train.examples.unended == len(dataset.train.examples.tokens):
        lines.append("WARNING: no row learns an end of text, so the model will not learn to stop")
    return "\n".join(lines)
