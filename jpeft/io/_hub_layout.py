# SPDX-License-Identifier: Apache-2.0
"""What AdapterHub's `adapters` 1.3.0 calls the places of a model; a family that it supports joins `LAYOUTS`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._method import Adapter, Site
from ..models._families import FAMILIES
from ._names import Names, names_of


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of layers.

    Attributes:
      layer: a layer's name, without what a model with a head puts before it.
      joins: for the path of a residual join, its name within the layer.
      prefixes: for the path of an attention's keys and values, what the library calls the prefixes there.
    """

    layer: str
    joins: Mapping[str, str]
    prefixes: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of one family.

    Attributes:
      stacks: in the order in which the library counts layers, through all of them.
      base: what models with a head put before the backbone's names.
      matrices: names within a layer of what `attn_matrices` and `*_lora` mean.
      coupled: whether its invertible adapters act where jpeft's do, on the token vectors alone.
      no_prefix: why a prefix is something else there; "" where it is not.
    """

    stacks: tuple[Stack, ...]
    base: str
    matrices: Mapping[str, tuple[str, ...]]
    coupled: bool = False
    no_prefix: str = ""


def _bert(base: str) -> Layout:
    joins = {"layers/attention/output/residual": "attention.output", "layers/output/residual": "output"}
    stack = Stack("encoder.layer.{}", joins, {"layers/attention/self/keys_values": "self_prefix"})
    matrices = {"q": ("attention.self.query",), "k": ("attention.self.key",), "v": ("attention.self.value",),
                "intermediate": ("intermediate.dense",), "output": ("output.dense",)}  # fmt: skip
    return Layout((stack,), base, matrices)


def _separate(layer: str, keys_values: str) -> Stack:
    """A stack whose layers have modules of their own for adapters."""
    joins = {"layers/attention_residual": "attention_adapters", "layers/mlp_residual": "output_adapters"}
    return Stack(layer, joins, {keys_values: "self_prefix"})


#: What the library calls the second linear layer of the block `intermediate`, and the other way round.
_LLAMA = Layout(
    (_separate("layers.{}", "layers/self_attn/keys_values"),),
    "model.",
    {"q": ("self_attn.q_proj",), "k": ("self_attn.k_proj",), "v": ("self_attn.v_proj",),
     "intermediate": ("mlp.down_proj",), "output": ("mlp.up_proj",)},
    coupled=True,
)  # fmt: skip
_T5 = Layout(
    (
        Stack(
            "encoder.block.{}",
            {"encoder/block/layer/0/residual": "layer.0", "encoder/block/layer/1/residual": "layer.1"},
            {"encoder/block/layer/0/SelfAttention/keys_values": "encoder_prefix"},
        ),
        Stack(
            "decoder.block.{}",
            {f"decoder/block/layer/{i}/residual": f"layer.{i}" for i in range(3)},
            {
                "decoder/block/layer/0/SelfAttention/keys_values": "self_prefix",
                "decoder/block/layer/1/EncDecAttention/keys_values": "cross_prefix",
            },
        ),
    ),
    "",
    {
        **{part: (f"layer.0.SelfAttention.{part}", f"layer.1.EncDecAttention.{part}") for part in "qkv"},
        "intermediate": tuple(f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in ("wi", "wi_1")),
        "output": tuple(f"layer.{i}.DenseReluDense.wo" for i in (1, 2)),
    },
    no_prefix="the library counts distances over prefix and text together, and adds their biases",
)
LAYOUTS: Mapping[str, Layout] = {
    "bert": _bert("bert."),
    "roberta": _bert("roberta."),
    "xlm-roberta": _bert("roberta."),
    "distilbert": Layout(
        (_separate("transformer.layer.{}", "layers/attention/keys_values"),),
        "distilbert.",
        {"q": ("attention.q_lin",), "k": ("attention.k_lin",), "v": ("attention.v_lin",),
         "intermediate": ("ffn.lin1",), "output": ("ffn.lin2",)},
        no_prefix="the library's own DistilBERT fails with one",
    ),
    "gpt2": Layout(
        (_separate("h.{}", "layers/attn/keys_values"),),
        "transformer.",
        {"qkv": ("attn.c_attn",), "intermediate": ("mlp.c_fc",), "output": ("mlp.c_proj",)},
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "t5": _T5,
}  # fmt: skip


class Hub:
    """One model in the library's names.

    Attributes:
      model, names, layout: the model, its Hugging Face names, and the library's for its family.
      name: of the adapter in the library.
      config: of the model, in Hugging Face's words.

    Raises:
      ValueError: the library has no such model.
    """

    def __init__(self, model: Any, name: str):
        kind = model.config.model_type
        if kind not in LAYOUTS:
            raise ValueError(f"adapters 1.3.0 has no {kind} that jpeft writes for; it has {', '.join(LAYOUTS)}")
        self.model = model
        self.names: Names = names_of(model)
        self.layout = LAYOUTS[kind]
        self.name = name
        self.config: dict[str, Any] = model.config.to_hf()

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return next(self.config[key] for key in ("hidden_size", "d_model", "dim", "n_embd") if key in self.config)

    @property
    def model_class(self) -> str | None:
        """transformers' class of the model."""
        return FAMILIES[self.model.config.model_type].architecture(self.model.task)

    def depths(self) -> list[int]:
        """Layers of each stack."""
        return [len(self.names.found[next(iter(stack.joins))].names) for stack in self.layout.stacks]

    def numbers(self, path: str) -> range:
        """The library's indices of the layers of the stack that holds the residual join or attention `path`."""
        at = next(i for i, s in enumerate(self.layout.stacks) if path in s.joins or path in s.prefixes)
        first = sum(self.depths()[:at])
        return range(first, first + self.depths()[at])

    def layer_names(self, site: Site) -> list[str]:
        """What its layers are called."""
        stack = next(s for s in self.layout.stacks if site.path in s.joins)
        return [self.layout.base + stack.layer.format(i) for i in range(len(site.names))]

    def join_names(self, site: Site) -> list[str]:
        """What the joins of a residual site are called, one per layer."""
        join = next(s.joins[site.path] for s in self.layout.stacks if site.path in s.joins)
        return [f"{layer}.{join}" for layer in self.layer_names(site)]

    def attention_names(self, site: Site) -> list[str]:
        """What the attentions of a site of keys and values are called, one per layer."""
        stack = next(s for s in self.layout.stacks if site.path in s.prefixes)
        within = ".".join(site.path.split("/")[1:-1])
        return [f"{self.layout.base}{stack.layer.format(i)}.{within}" for i in range(len(site.names))]

    def whole_name(self, name: str) -> str:
        """Hugging Face's name of a module, with what models with a head put before it."""
        return name if name.startswith(self.layout.base) else self.layout.base + name

    def acting(self, adapters: Iterable[Adapter]) -> list[int]:
        """The library's indices of the layers in which residual adapters act.

        Raises:
          ValueError: they act in other layers at one place than at another, which the library cannot say.
        """
        found: dict[int, set[bool]] = {}
        for site in (adapter.site for adapter in adapters):
            if site.path in {path for stack in self.layout.stacks for path in stack.joins}:
                for number, acts in zip(self.numbers(site.path), site.active, strict=True):
                    found.setdefault(number, set()).add(acts)
        odd = [number for number, acts in found.items() if len(acts) > 1]
        if odd:
            raise ValueError(f"the adapter acts in a part of layer {odd[0]} alone; adapters leaves out whole layers")
        return sorted(number for number, acts in found.items() if acts == {True})

    def own_layers(self, numbers: Iterable[int], what: str) -> list[int]:
        """jpeft's indices, which count in every stack from 0, of the layers with these `numbers`.

        Raises:
          ValueError: they are not the same layers in every stack; or there are no such layers.
        """
        numbers, first, parts = {*numbers}, 0, []
        for depth in self.depths():
            parts.append(sorted(n - first for n in numbers if first <= n < first + depth))
            first += depth
        if unknown := sorted(n for n in numbers if not 0 <= n < first):
            raise ValueError(f"{what} names layer {unknown[0]}, and the model has {first}")
        if any(part != parts[0] for part in parts):
            raise ValueError(
                f"{what}={sorted(numbers)} is of other layers in the encoder than in the decoder, which no method of "
                "jpeft's is"
            )
        return parts[0]

    def matrices(self, parts: Sequence[str], without: Iterable[int] = ()) -> list[str]:
        """Names of the model's matrices that these parts mean, but for those in the layers `without`.

        Raises:
          ValueError: the library has no such part on this model.
        """
        if odd := [part for part in parts if part not in self.layout.matrices]:
            raise ValueError(f"on a {self.model.config.model_type} jpeft reads no {odd[0]} of the library's LoRA")
        endings = {ending for part in parts for ending in self.layout.matrices[part]}
        left_out = {*without}
        return [
            name
            for name in sorted(self.names.matrices)
            if (place := self._within(name)) and place[1] in endings and place[0] not in left_out
        ]

    def of_layer(self, number: int) -> list[str]:
        """Names of all the matrices of the layer with this number."""
        return [name for name in self.names.matrices if (place := self._within(name)) and place[0] == number]

    def _within(self, name: str) -> tuple[int, str] | None:
        """(the library's index of a module's layer, the module's name in it)."""
        first = 0
        for stack, depth in zip(self.layout.stacks, self.depths(), strict=True):
            rule = re.escape(stack.layer).replace(r"\{\}", r"(\d+)") + r"\.(.+)"
            found = re.fullmatch(rf"(?:{re.escape(self.layout.base)})?{rule}", name)
            if found:
                return first + int(found[1]), found[2]
            first += depth
        return None
