# SPDX-License-Identifier: Apache-2.0
"""The methods of the contracts' table. A new method joins by one line in `METHODS`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jpeft


@dataclasses.dataclass(frozen=True)
class Line:
    """One method.

    Attributes:
      make: the method, from the targets.
      targeted: whether it heeds them.
      identity: whether it starts as the base.
      merges: whether it has a merged form.
      drawn: whether its start is drawn from the key.
      on: the models on which it has a meaning; the others refuse it.
      fast: the models on which it is tested in the fast lane.
      exact: whether its gradient is that of its output, rather than with a part of it held constant.
      constant: leaves that start everywhere as the same matrix, which is not drawn.
    """

    make: Callable[[Any], Any]
    targeted: bool = True
    identity: bool = True
    merges: bool = True
    drawn: bool = True
    on: tuple[str, ...] = ("foreign", "bert", "llama", "quantized llama", "t5")
    fast: tuple[str, ...] = ("foreign",)
    exact: bool = True
    constant: tuple[str, ...] = ()


def tables_aside(targets: Any) -> Any:
    """The targets without the embeddings, for a method that refuses those."""
    return [target for target in targets if "embed" not in target and target != "shared"]


FLOAT = ("foreign", "bert", "llama", "tied llama", "t5")
EVERY = (*FLOAT, "quantized llama")
FEEDFORWARD = {"up", "output.dense", "down_proj", "gate_proj", "wo"}

#: Methods by a name for the test. A new method needs one line.
METHODS: dict[str, Line] = {
    "lora": Line(lambda targets: jpeft.LoRA(rank=2, alpha=3.0, targets=targets), on=EVERY, fast=EVERY),
    "lora of several ranks, with biases and dropout": Line(
        lambda targets: jpeft.LoRA(
            rank=3,
            alpha=2.0,
            targets=targets,
            rslora=True,
            bias="lora_only",
            dropout=0.3,
            rank_pattern={r".*\.1\..*": 1},
        ),
        fast=("bert",),
    ),
    "lora from the kernel": Line(
        lambda targets: jpeft.LoRA(rank=2, alpha=3.0, targets=targets, init="pissa"),
        drawn=False,
        on=EVERY,
        fast=("foreign",),
    ),
    "ia3": Line(
        lambda targets: jpeft.IA3(targets=targets, feedforward=[t for t in targets if t in FEEDFORWARD]),
        drawn=False,
        on=EVERY,
    ),
    "trainable tokens": Line(
        lambda targets: jpeft.TrainableTokens(
            (7, 1, 3, 8), targets=r"(.*\.)?(embed|embed_tokens|word_embeddings|shared)"
        ),
        targeted=False,
        drawn=False,
        on=EVERY,
        fast=("tied llama",),
    ),
    "bitfit": Line(lambda targets: jpeft.BitFit(), targeted=False, drawn=False, on=("foreign", "bert")),
    "norm tuning": Line(lambda targets: jpeft.NormTuning(), targeted=False, drawn=False, on=EVERY),
    "full fine-tuning": Line(
        lambda targets: jpeft.FullFineTune(),
        targeted=False,
        drawn=False,
        on=FLOAT,
        fast=("tied llama",),
    ),
    "the last layer": Line(
        lambda targets: jpeft.LastLayers(
            1,
            targets=r"decoder\..*" if "wo" in targets else ".*",
            final=("out",) if "up" in targets else None,
        ),
        targeted=False,
        drawn=False,
        on=FLOAT,
        fast=("llama",),
    ),
    "dora": Line(
        lambda targets: jpeft.DoRA(rank=2, alpha=3.0, targets=targets),
        on=EVERY,
        fast=("foreign", "quantized llama"),
        exact=False,
    ),
    "dora of several ranks from the kernel, with biases and dropout": Line(
        lambda targets: jpeft.DoRA(
            rank=2,
            alpha=2.0,
            targets=targets,
            rslora=True,
            init="pissa",
            bias="lora_only",
            dropout=0.3,
            rank_pattern={r".*\.1\..*": 1},
        ),
        fast=("foreign",),
        drawn=False,
        exact=False,
    ),
    "adalora": Line(
        lambda targets: jpeft.AdaLoRA(init_rank=3, target_rank=2, alpha=9.0, targets=targets, total_steps=10), on=EVERY
    ),
    "loha": Line(lambda targets: jpeft.LoHa(rank=2, alpha=3.0, targets=targets), on=EVERY, fast=("llama",)),
    "loha of several ranks with dropout": Line(
        lambda targets: jpeft.LoHa(
            rank=3, alpha=2.0, targets=targets, rank_dropout=0.3, module_dropout=0.2, rank_pattern={r".*\.1\..*": 1}
        ),
        fast=("foreign",),
    ),
    "lokr": Line(lambda targets: jpeft.LoKr(rank=1, alpha=3.0, targets=targets), on=EVERY, fast=("bert",)),
    "lokr of two products with dropout": Line(
        lambda targets: jpeft.LoKr(
            rank=1,
            alpha=2.0,
            targets=targets,
            decompose_both=True,
            decompose_factor=4,
            init="lycoris",
            rank_dropout=0.3,
            module_dropout=0.2,
            alpha_pattern={r".*\.1\..*": 1.0},
        ),
        fast=("foreign",),
    ),
    "vera": Line(
        lambda targets: jpeft.VeRA(rank=5, targets=tables_aside(targets)), on=EVERY, drawn=False, fast=("llama",)
    ),
    "vera with dropout": Line(
        lambda targets: jpeft.VeRA(rank=3, d_initial=0.5, dropout=0.3, targets=tables_aside(targets)),
        drawn=False,
        fast=("foreign",),
    ),
    "oft": Line(
        lambda targets: jpeft.OFT(block_size=4, targets=tables_aside(targets)),
        on=EVERY,
        drawn=False,
        fast=("bert",),
    ),
    "oft exact, shared, bounded, with dropout": Line(
        lambda targets: jpeft.OFT(
            rank=2,
            targets=tables_aside(targets),
            neumann_terms=None,
            coft=True,
            eps=0.9,
            block_share=True,
            block_dropout=0.2,
        ),
        drawn=False,
        fast=("foreign",),
    ),
    "fourierft": Line(lambda targets: jpeft.FourierFT(n_frequency=5, scaling=9.0, targets=targets), identity=False),
    "houlsby with dropout": Line(
        lambda _: jpeft.Houlsby(reduction_factor=2, scaling="learned", dropout=0.3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("bert",),
    ),
    "pfeiffer of several widths, with norms and a coupling": Line(
        lambda _: jpeft.Pfeiffer(
            reduction_factor={0: 4, "default": 2},
            non_linearity="gelu",
            ln_before=True,
            ln_after=True,
            invertible="nice",
        ),
        targeted=False,
        identity=False,
        merges=False,
        fast=("t5",),
    ),
    "pfeiffer with a gate": Line(
        lambda _: jpeft.Pfeiffer(reduction_factor=2, gate=True, original_ln_after=False),
        targeted=False,
        identity=False,
        merges=False,
        on=("bert",),
        fast=("bert",),
    ),
    "parallel adapter in one layer": Line(
        lambda _: jpeft.ParallelAdapter(layers=[1], non_linearity="swish", scaling="channel"),
        targeted=False,
        merges=False,
        fast=("llama",),
    ),
    "compacter": Line(
        lambda _: jpeft.Compacter(reduction_factor=2, n=2, rule_std=0.5),
        targeted=False,
        identity=False,
        merges=False,
    ),
    "adapter fusion": Line(
        lambda _: (
            jpeft.Pfeiffer(reduction_factor=2, scaling=100.0)
            | jpeft.Pfeiffer(reduction_factor=4, scaling=100.0)
            | jpeft.AdapterFusion(adapters=("pfeiffer", "pfeiffer_2"))
        ),
        targeted=False,
        identity=False,
        merges=False,
        fast=("llama",),
        constant=("value",),
    ),
    "prompt tuning": Line(
        lambda targets: jpeft.PromptTuning(num_tokens=3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("t5",),
    ),
    "prompt tuning from the vocabulary": Line(
        lambda targets: jpeft.PromptTuning(num_tokens=5, init="vocabulary"),
        targeted=False,
        identity=False,
        merges=False,
        fast=("llama",),
    ),
    "p-tuning": Line(
        lambda targets: jpeft.PTuning(num_tokens=3, hidden_size=7),  # with no ReLU's kink near
        targeted=False,
        identity=False,
        merges=False,
        fast=("bert",),
    ),
    "p-tuning by lstm, with dropout": Line(
        lambda targets: jpeft.PTuning(num_tokens=3, hidden_size=5, reparam="lstm", dropout=0.3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("foreign",),
    ),
    "prefix tuning": Line(
        lambda targets: jpeft.PrefixTuning(num_tokens=3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("llama", "t5"),
    ),
    "prefix tuning by a projection, in one layer, positions shifted": Line(
        lambda targets: jpeft.PrefixTuning(
            num_tokens=3, projection=True, hidden_size=5, layers=[1], shift_positions=True
        ),
        targeted=False,
        identity=False,
        merges=False,
        fast=("bert",),
    ),
    "gated prefix tuning": Line(
        lambda targets: jpeft.PrefixTuning(num_tokens=3, gate=True),
        targeted=False,
        identity=False,
        merges=False,
        on=("bert",),
        fast=("bert",),
    ),
    "gated lora": Line(
        lambda targets: jpeft.LoRA(rank=2, alpha=3.0, targets=[t for t in targets if "embed" not in t], gate=True),
        merges=False,
        on=("bert",),
        fast=("bert",),
    ),
    "loreft": Line(
        lambda _: jpeft.LoReFT(rank=2, first=2, last=1), targeted=False, identity=False, merges=False, fast=("t5",)
    ),
    "untied loreft in one layer, with dropout": Line(
        lambda _: jpeft.LoReFT(rank=2, first=2, last=2, tied=False, layers=[1], dropout=0.3),
        targeted=False,
        identity=False,
        merges=False,
    ),
    "noreft": Line(lambda _: jpeft.NoReFT(rank=2), targeted=False, identity=False, merges=False, fast=("bert",)),
    "direft": Line(lambda _: jpeft.DiReFT(last=1), targeted=False, identity=False, merges=False, fast=("bert",)),
}
