# SPDX-License-Identifier: Apache-2.0
"""A configuration made real: data as batches, and the adapted model as arrays in their places."""

import dataclasses
from collections.abc import Mapping, Sequence
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
from . import data, readers
from .batches import Batches
from .config import Config
from .encoding import Encoder
from .feed import Feed
from .pictures import Pictures, pixels
from .preference import with_reference
from .readers import Reader, Sight
from .saved import no_form_in_peft
from .sections.model import SEEING
from .streaming import Streamed, stream
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains and is evaluated on.

    Attributes:
      reader: of the model's folder: its tokenizer, or what makes images ready.
      label_names: in the order of the head's outputs; None for a language model.
      train: batches of one update each; of a stream those of its first window.
      eval: batches of one evaluation, or None.
      num_updates: updates of the whole run.
      stream: what is trained on in the place of `train`, where rows are not all held.
      template: that made the conversations text, in jinja; None where there are none.
      max_length: tokens that a text is cut to; None of images.
      known_by: what tokens follow from beside rows, options and tokenizer, of `Encoder.known_by`; empty of images.
    """

    reader: Reader
    label_names: tuple[str, ...] | None
    train: Feed
    eval: Feed | None
    num_updates: int
    stream: Streamed | None = None
    template: str | None = None
    max_length: int | None = None
    known_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The reader of texts."""
        assert isinstance(self.reader, Tokenizer), "images have no tokenizer"
        return self.reader

    @property
    def feed(self) -> Feed | Streamed:
        """What the training walks through."""
        return self.train if self.stream is None else self.stream

    def epochs(self, updates: int) -> float | None:
        """Passes over the data that so many updates are; None of a stream."""
        return None if self.stream is not None else round(updates / self.train.buckets.num_batches, 4)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every data file; of images, of every source with all its files."""
        return self.train.examples.digests | (self.eval.examples.digests if self.eval else {})

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every image file."""
        parts = [part.examples for part in (self.train, self.eval) if part is not None]
        return {file: digest for part in parts if isinstance(part, Pictures) for file, digest in part.files.items()}


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
    """Reads the data of a configuration, and makes tokens or images of it.

    Raises:
      FileNotFoundError, DataError: see `data`.
      CheckpointError: the processor is another model's.
      ValueError: the model reads images and its task is for texts, or the other way round.
    """
    reader, options = readers.load(model_folder(config.model.path)), config.data
    task = "PREFERENCE" if config.train.objective == "dpo" else config.model.task
    if (task in SEEING) != isinstance(reader, Sight):
        reads, wanted = ("images", "texts") if isinstance(reader, Sight) else ("texts", "images")
        raise ValueError(f"model.task={task} is for models that read {wanted}, and {config.model.path} reads {reads}")
    rows = data.read_rows(options, task, "train")
    names = None
    if task in configuration.CLASSIFYING:
        names = options.label_names or data.label_names(rows)
    fed = _seen(config, rows, reader, names) if isinstance(reader, Sight) else _told(config, rows, reader, names)
    held, others = None, []
    if configuration.paths(options.eval):
        others = data.read_rows(options, task, "eval")
        held = fed.train.like(data.encode(others, options, reader, names))
    known = {} if isinstance(reader, Sight) else _known(options, reader, [part.reader for part in [*rows, *others]])
    updates = config.train.max_steps or (config.train.epochs or 1) * fed.train.buckets.num_batches
    return dataclasses.replace(fed, eval=held, num_updates=updates, known_by=known)


def _seen(config: Config, rows: Sequence[data.Part], sight: Sight, names: tuple[str, ...] | None) -> Dataset:
    """Images to train on."""
    train = config.train
    shape = {"batch_size": train.batch_size, "accumulation": train.accumulation}
    examples = data.encode(rows, config.data, sight, names, train.seed)
    return Dataset(sight, names, pixels(examples, sight.processor, sight.image, sight.tokens, **shape), None, 0)


def _told(config: Config, rows: Sequence[data.Part], words: Tokenizer, names: tuple[str, ...] | None) -> Dataset:
    """Texts to train on."""
    options, train = config.data, config.train
    shape = {"batch_size": train.batch_size, "accumulation": train.accumulation, "pad_id": words.pad_id}
    encoder, streamed = Encoder(options, words, names), None
    if options.streaming:
        streamed = stream(rows, options, encoder, **shape)
        batches = streamed.first
    else:
        examples = data.encode(rows, options, words, names, train.seed)
        fixed = {name: getattr(options, name) for name in ("max_length", "max_target", "num_widths", "packing")}
        batches = data.make_batches(examples, **shape, **fixed)
    spoken = encoder.spoken([part.reader for part in rows])
    return Dataset(words, names, batches, None, 0, streamed, spoken and spoken.source, options.max_length)


def _known(options: data.Data, words: Tokenizer, forms: Sequence[data.Form]) -> dict[str, Any]:
    """What makes tokens of rows, for a run's record; refuses options for conversations where there are none."""
    given = [name for name in ("template", "loss_on") if getattr(options, name) != getattr(data.Data, name)]
    if given and not any(form.form.talks for form in forms):
        raise data.DataError(
            f"data.{given[0]} is for conversations, and these rows are of the form {forms[0].form.name}"
        )
    return Encoder(options, words, None).known_by(forms)


def with_references(dataset: Dataset, parts: Parts, mesh: Mesh | None) -> Dataset:
    """The same data with the reference's log-probabilities beside every pair."""
    leaves = parts.graphdef, parts.trainable, parts.frozen
    assert isinstance(dataset.train, Batches)
    held = with_reference(dataset.eval, *leaves, mesh) if isinstance(dataset.eval, Batches) else None
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
    return Parts(*partition(model if mesh is None else shard(model, mesh, uneven=config.uneven)), counts, reason)


def load_base(config: Config, label_names: tuple[str, ...] | None, mesh: Mesh | None = None) -> Any:
    """The base model, with a new head where it needs one. Raises as `models.load`."""
    return models.load(
        config.model.path,
        config.model.task,
        config.model.dtype,
        key=jax.random.fold_in(jax.random.key(config.train.seed), 0),
        num_labels=None if label_names is None else len(label_names),
        remat=config.model.remat,
        sharding=None if mesh is None else placement(mesh, uneven=config.uneven),
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
    epoch, most = dataset.train.buckets.num_batches, len(dataset.train.buckets.widths)
    lines += [
        f"batches of {config.train.batch_size} x {config.train.accumulation} rows of {dataset.train.shapes};"
        f" {100 * real / padded:.1f} % of what is computed is real",
        f"{dataset.num_updates:,} updates, {epoch:,} an epoch; at most {most} compilation{'s' * (most > 1)}",
    ]
    if dataset.train.examples.warning:
        lines.append(f"WARNING: {dataset.train.examples.warning}")
    return "\n".join(lines)
