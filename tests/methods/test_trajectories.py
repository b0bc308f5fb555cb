# SPDX-License-Identifier: Apache-2.0
"""Whole trainings beside the real peft: each method's losses, one by one, and its leaves after the last update.

The loss is transformers' own on one side and jpeft's on the other. AdaLoRA's training, whose ranks change on the way,
is in test_adalora.py. A prefix is not trained on T5: peft's stands in the decoder alone, jpeft's in the encoder too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import blocks_oracle
import jax
import numpy as np
import peft
import peft_leaves
import peft_oracle as oracle
import pytest
import subjects
import torch_twin
import trajectory
import virtual_oracle
from trajectory import Twins

import jpeft
from jpeft.io.peft import CODECS

KEY = jax.random.key(0)
#: Of a loss, and of a leaf's norm: float32 through three layers in another order of sums, 20 times over.
LOSSES, LEAVES = 1e-4, 1e-4


def low_rank(family: str, config: dict[str, Any], method: Any) -> Twins:
    """LoRA or DoRA."""
    with oracle.quiet():
        other = peft.get_peft_model(oracle.torch_model(family), peft.LoraConfig(**config)).eval()
    model = jpeft.adapt(oracle.jax_model(family), method, key=KEY)
    peft_leaves.give(model, other)
    return Twins(model, other, lambda leaves: peft_leaves.differences(model, other, leaves, "data"))


def of_kernels(family: str, config: Any, method: Any) -> Twins:
    """A method that `blocks_oracle` knows."""
    model = jpeft.adapt(oracle.jax_model(family), method, key=KEY)
    both = blocks_oracle.in_transformers(family, model, config, blocks_oracle.NAMES[method.kind])

    def errors(leaves: Any) -> dict[str, float]:
        return {path: subjects.error(leaves[path], value) for path, value in both.theirs(leaves, "data").items()}

    return Twins(both.model, both.other, errors)


def named(family: str, other: Any, method: Any, values: torch_twin.ValuesOf) -> Twins:
    """A method whose leaves have transformers' names."""
    model = jpeft.adapt(oracle.jax_model(family), method, key=KEY)
    twins = torch_twin.give(model, other, values)

    def errors(leaves: Any) -> dict[str, float]:
        return {name: subjects.error(value, twins[name].detach()) for name, value in values(model, leaves).items()}

    return Twins(model, other, errors)


def virtual(family: str, config: Any, method: Any, names: Any) -> Twins:
    """A method with virtual tokens."""
    found = virtual_oracle.beside(family, method, config, names)

    def errors(leaves: Any) -> dict[str, float]:
        return {path: subjects.error(leaves[path], value) for path, value in found.taken("data").items()}

    return Twins(found.model, found.other, errors)


def task(family: str) -> str:
    return oracle.FAMILIES[family][1]


def lora(family: str, dora: bool = False, **options: Any) -> Twins:
    targets = {"bert cls": ["query", "output.dense", "word_embeddings"], "t5": ["q", "wo"]}
    options = {"targets": targets.get(family, ["q_proj", "down_proj"]), "bias": "none", "rslora": False} | options
    names = {"targets": "target_modules", "rslora": "use_rslora"}
    config = {"r": 3, "lora_alpha": 5, "use_dora": dora} | {names.get(k, k): v for k, v in options.items()}
    make = jpeft.DoRA if dora else jpeft.LoRA
    return low_rank(family, config, make(rank=3, alpha=5, modules_to_save=(), **options))


def loha(family: str) -> Twins:
    return of_kernels(family, peft.LoHaConfig(r=3, alpha=2), jpeft.LoHa(rank=3, alpha=2, modules_to_save=()))


def lokr(family: str) -> Twins:
    method = jpeft.LoKr(rank=1, alpha=2, decompose_both=True, modules_to_save=())
    return of_kernels(family, peft.LoKrConfig(r=1, alpha=2, decompose_both=True), method)


def vera(family: str) -> Twins:
    return of_kernels(family, peft.VeraConfig(r=7), jpeft.VeRA(rank=7, modules_to_save=()))


def oft(family: str) -> Twins:
    return of_kernels(family, peft.OFTConfig(oft_block_size=4), jpeft.OFT(block_size=4, modules_to_save=()))


def fourierft(family: str) -> Twins:
    config = peft.FourierFTConfig(n_frequency=7, scaling=40.0)
    return of_kernels(family, config, jpeft.FourierFT(n_frequency=7, scaling=40, modules_to_save=()))


def ia3(family: str) -> Twins:
    other = torch_twin.get_peft(family, peft.IA3Config(task_type=task(family)))
    shapes = {torch_twin.plain_name(name): p.shape for name, p in other.named_parameters()}
    return named(family, other, jpeft.IA3(), functools.partial(torch_twin.ia3_values, shapes))


def norms(family: str, targets: Any = None) -> Twins:
    other = torch_twin.get_peft(family, peft.LNTuningConfig(task_type=task(family), target_modules=targets))
    return named(family, other, jpeft.NormTuning(targets=targets), torch_twin.active_values)


def tokens(family: str) -> Twins:
    table = {"bert cls": "bert.embeddings.word_embeddings"}.get(family, "model.embed_tokens")
    chosen = tuple({*trajectory.batches(task(family))[0]["input_ids"][0].tolist()})
    names = {"token_indices": [*chosen], "target_modules": [table.rpartition(".")[2]]}
    other = torch_twin.get_peft(family, peft.TrainableTokensConfig(task_type=task(family), **names))
    method = jpeft.TrainableTokens(chosen, modules_to_save=())
    return named(family, other, method, functools.partial(torch_twin.token_values, table))


def of_torch(family: str, method: Any, which: Callable[[str], bool]) -> Twins:
    """No method of peft: transformers' own parameters whose names say so."""
    return named(family, torch_twin.trained_in(family, which), method, torch_twin.active_values)


def prompt(family: str) -> Twins:
    config = peft.PromptTuningConfig(task_type=task(family), num_virtual_tokens=3, num_transformer_submodules=1)
    return virtual(family, config, jpeft.PromptTuning(num_tokens=3), virtual_oracle.PROMPT)


def p_tuning(family: str, **options: Any) -> Twins:
    options = {"num_tokens": 3, "hidden_size": 5, **options}
    names = virtual_oracle.encoder_names(options.get("num_layers", 0))
    config = virtual_oracle.p_tuning_config(task(family), options)
    return virtual(family, config, jpeft.PTuning(**options), names)


def prefix(family: str, projection: bool = False) -> Twins:
    hidden = {"hidden_size": 5} if projection else {}
    theirs = {"prefix_projection": projection} | ({"encoder_hidden_size": 5} if projection else {})
    config = peft.PrefixTuningConfig(task_type=task(family), num_virtual_tokens=3, **theirs)
    method = jpeft.PrefixTuning(num_tokens=3, projection=projection, shift_positions=True, **hidden)
    names = virtual_oracle.projected_names() if projection else virtual_oracle.prefix_names(family)
    return virtual(family, config, method, names)


class Case(NamedTuple):
    """One training.

    Attributes:
      make: family -> the twins.
      families: of `peft_oracle`.
      rate: of learning.
      falls: to what part of its start the loss must fall, for a training to tell of its updates.
    """

    make: Callable[[str], Twins]
    families: tuple[str, ...] = ("bert cls", "llama")
    rate: float = 1e-2
    falls: float = 0.95


LSTM = {"reparam": "lstm", "num_layers": 2}
CASES = {
    "lora": Case(lora, ("bert cls", "llama", "t5"), rate=2e-2),
    "rslora of several ranks": Case(lambda f: lora(f, rslora=True, rank_pattern={r".*\.1\..*": 4})),
    "lora and biases": Case(lambda f: lora(f, bias="lora_only")),
    "dora": Case(lambda f: lora(f, dora=True)),
    "loha": Case(loha, rate=5e-2),
    "lokr": Case(lokr, rate=5e-2),
    "vera": Case(vera, rate=5e-2),
    "oft": Case(oft),
    "fourierft": Case(fourierft, rate=5e-2),
    "ia3": Case(ia3, rate=5e-2),
    "norms": Case(lambda f: norms(f, ["LayerNorm"] if "bert" in f else None), rate=3e-2),
    "tokens": Case(tokens, rate=5e-2),
    "prompt": Case(prompt, rate=0.1),
    "prompt of an encoder, which its decoder hears little of": Case(prompt, ("t5",), rate=0.1, falls=0.985),
    "p-tuning": Case(p_tuning, rate=5e-2),
    "p-tuning by lstm": Case(lambda f: p_tuning(f, **LSTM), rate=5e-2),
    "prefix": Case(prefix, rate=5e-2),
    "prefix by a projection": Case(lambda f: prefix(f, projection=True)),
    "bitfit": Case(
        lambda f: of_torch(f, jpeft.BitFit(), lambda n: n.endswith(".bias") or torch_twin.is_head(n)), rate=3e-2
    ),
    "full": Case(lambda f: of_torch(f, jpeft.FullFineTune(), lambda n: True)),
    "last layers, bert": Case(
        lambda f: of_torch(f, jpeft.LastLayers(1), lambda n: "layer.2." in n or "pooler" in n or torch_twin.is_head(n)),
        ("bert cls",),
    ),
    "last layers, llama": Case(
        lambda f: of_torch(f, jpeft.LastLayers(2), lambda n: ".1." in n or ".2." in n or n == "model.norm.weight"),
        ("llama",),
    ),
}
#: In the fast lane, one of each kind of method.
FAST = ("lora", "dora", "lokr", "ia3", "tokens", "prompt", "prefix", "bitfit")
RUNS = [
    pytest.param(name, family, marks=() if name in FAST and family == case.families[0] else pytest.mark.slow)
    for name, case in CASES.items()
    for family in case.families
]


#: What a kind of PEFT's is called here, where that is not its name; AdaLoRA's training is in test_adalora.py.
CALLED = {
    "norm_tuning": "norms",
    "trainable_tokens": "tokens",
    "prompt_tuning": "prompt",
    "p_tuning": "p-tuning",
    "prefix_tuning": "prefix",
}


def test_every_method_of_peft_is_trained_beside_it():
    assert {CALLED.get(kind, kind) for kind in CODECS if kind != "adalora"} <= {name.split()[0] for name in CASES}


@pytest.mark.parametrize("name, family", RUNS, ids=lambda value: value)
def test_a_training_is_that_of_torch(name, family):
    case, rows = CASES[name], trajectory.batches(task(family))
    twins = case.make(family)
    start = jpeft.partition(twins.model)[1]
    losses, trained = trajectory.train(twins.model, rows, case.rate)
    expected = trajectory.train_torch(twins.other, rows, case.rate)
    assert expected[-2:].mean() < case.falls * expected[:2].mean()
    np.testing.assert_allclose(losses, expected, rtol=LOSSES)
    errors = twins.errors(trained)
    assert max(errors.values()) < LEAVES, max(errors, key=lambda path: errors[path])
    assert all(subjects.error(trained[path], value) > LEAVES for path, value in start.items())
