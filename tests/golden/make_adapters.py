# SPDX-License-Identifier: Apache-2.0
"""Makes adapters_bert.npz and adapters_llama.npz: what AdapterHub's `adapters` 1.3.0 computes on tiny models.

It needs transformers 4.57, so an environment of its own:

  python3.11 -m venv /tmp/adapters_env
  /tmp/adapters_env/bin/pip install torch==2.13.0
  /tmp/adapters_env/bin/pip install adapters==1.3.0
  /tmp/adapters_env/bin/python tests/golden/make_adapters.py

A file holds, for one model: `config` and `training` (JSON), `base/<name>` its weights, `ids`, `mask`, `cotangent`, and
per case `<case>/leaf/<name>` the adapter's weights, `<case>/grad/<name>` their gradients of the loss
sum(cotangent * output) over the tokens, `<case>/output` the last hidden states. All was computed in float64 from
weights that are float32 exactly, and rounded to float32. A method joins by its line in `CASES`.

Of the cases that are `trained` there are also `<case>/losses`, of a training by AdamW as `TRAINING` says (the mean
square distance of the output from the cotangent over the tokens, and for a fusion the library's regulariser), and
`<case>/trained/<name>`, of each trained weight afterwards: its norm, and the sum of it times the sine of the index.
"""

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
import transformers
from adapters import composition  # pyright: ignore[reportMissingImports]

SEED = 0
SEQ = 7
SMALL = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
BERT = {**SMALL, "model_type": "bert", "max_position_embeddings": 12, "initializer_range": 0.2}
LLAMA = {**SMALL, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0}

#: Of AdamW, on two batches in turn: the inputs, and these with each row backwards.
TRAINING: dict[str, Any] = {"updates": 20, "rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-4, "decay": 0.05}

#: What a fusion's weights are times, to begin with. Else its scores, which nothing divides by the root of the width,
#: are so large that rounding grows a hundredfold in a few updates; on Llama, whose stream has no norm, they always are.
SHRUNK = 0.125

MODELS: dict[str, Any] = {
    "bert": (transformers.BertConfig, transformers.BertModel, {"add_pooling_layer": False}, BERT),
    "llama": (transformers.LlamaConfig, transformers.LlamaModel, {}, LLAMA),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method.

    Attributes:
      add: puts it on a model and makes it active.
      models: the models that it is run on.
      padded: whether with padding; where the library lets padding change the output, without.
      trained: part of the names of the weights that a training is recorded of; None for no training.
    """

    add: Callable[[Any], None]
    models: tuple[str, ...] = ("bert", "llama")
    padded: bool = True
    trained: str | None = None


def one(config: Any) -> Callable[[Any], None]:
    """A single adapter, called `a`."""

    def add(model: Any) -> None:
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")

    return add


def prefixed(config: Any) -> Callable[[Any], None]:
    """`one` with a prefix, which the library puts before Llama's mask as zeros: in one of truth values, hidden."""

    def add(model: Any) -> None:
        one(config)(model)
        if model.config.model_type == "llama":
            model.set_attn_implementation("eager")  # whose mask is added, so that zeros are seen

    return add


def fused(kind: str, *configs: Any) -> Callable[[Any], None]:
    """Adapters `a`, `b`, ... under an AdapterFusion."""

    def add(model: Any) -> None:
        names = [chr(ord("a") + i) for i in range(len(configs))]
        for name, config in zip(names, configs, strict=True):
            model.add_adapter(name, config=config)
        setup = composition.Fuse(*names)
        model.add_adapter_fusion(setup, kind)
        model.train_adapter_fusion(setup)
        for parameter in model.parameters():  # the tests ask for all gradients
            parameter.requires_grad_(True)

    return add


PFEIFFER = adapters.SeqBnConfig(reduction_factor=4)
#: Of BERT alone: where keys have fewer heads than queries, what jpeft and PEFT project is as wide as the keys of all
#: heads, and here as wide as the model.
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5)
CASES = {
    "pfeiffer": Case(one(PFEIFFER), trained=""),
    "houlsby": Case(one(adapters.DoubleSeqBnConfig(reduction_factor=8)), trained=""),
    "parallel": Case(one(adapters.ParBnConfig(reduction_factor=4, scaling=3.0)), trained=""),
    "parallel learned": Case(one(adapters.ParBnConfig(reduction_factor=8, scaling="learned", ln_after=True))),
    "norms": Case(
        one(
            adapters.SeqBnConfig(
                reduction_factor={"0": 4, "default": 8}, ln_before=True, ln_after=True, scaling="channel"
            )
        )
    ),
    "norm of the sum": Case(
        one(adapters.DoubleSeqBnConfig(reduction_factor=8, ln_after=True, adapter_residual_before_ln=True))
    ),
    "residual after": Case(one(adapters.SeqBnConfig(reduction_factor=8, residual_before_ln=False, leave_out=[0]))),
    "residual post add": Case(
        one(adapters.SeqBnConfig(reduction_factor=8, residual_before_ln="post_add", original_ln_after=False)), ("bert",)
    ),
    "no norm after": Case(one(adapters.DoubleSeqBnConfig(reduction_factor=8, original_ln_after=False))),
    "gate": Case(one(adapters.SeqBnConfig(reduction_factor=8, use_gating=True)), ("bert",), padded=False),
    "coupling": Case(one(adapters.SeqBnInvConfig(reduction_factor=8)), ("llama",)),
    "compacter": Case(one(adapters.CompacterConfig(reduction_factor=4, phm_dim=4)), trained=""),
    "compacter++": Case(one(adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, phm_rank=2))),
    "fusion": Case(
        fused("dynamic", PFEIFFER, adapters.SeqBnConfig(reduction_factor=8, non_linearity="gelu")),
        trained="adapter_fusion_layer",
    ),
    "static fusion": Case(
        fused("static", *(adapters.DoubleSeqBnConfig(reduction_factor=f) for f in (8, 16, 8))), ("bert",)
    ),
    "fusion of parallel": Case(
        fused("dynamic", adapters.ParBnConfig(reduction_factor=8), adapters.ParBnConfig()), ("bert",)
    ),
    "prefix": Case(prefixed(adapters.PrefixTuningConfig(flat=True, prefix_length=3)), trained=""),
    "prefix by a projection": Case(prefixed(PREFIX), ("bert",), trained=""),
    "mam": Case(prefixed(adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=4))), ("bert",), trained=""),
    "unipelt": Case(
        prefixed(adapters.UniPELTConfig(PREFIX, PFEIFFER, adapters.LoRAConfig(r=2, alpha=2))), ("bert",), False, ""
    ),
}


def base_model(family: str) -> Any:
    """A model whose every weight is random, norms and biases too."""
    make_config, make, options, attributes = MODELS[family]
    torch.manual_seed(SEED)
    model = make(make_config(**attributes), **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                weight.add_(0.2 * torch.randn_like(weight))
            elif family == "llama":
                weight.mul_(10)
    return model


def inputs() -> dict[str, np.ndarray]:
    """Three rows: padded on the right, padded on the left, full."""
    rng = np.random.default_rng(SEED)
    mask = np.array([[1] * 5 + [0] * 2, [0] * 3 + [1] * 4, [1] * SEQ])
    ids = rng.integers(1, SMALL["vocab_size"], mask.shape) * mask
    cotangent = rng.standard_normal((*mask.shape, SMALL["hidden_size"])).astype(np.float32)
    return {"ids": ids, "mask": mask, "cotangent": cotangent}


def run(base: Any, case: Case, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, gradients and outputs of one case."""
    model = copy.deepcopy(base)
    known = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    case.add(model)
    torch.manual_seed(SEED + 1)
    own = {name: weight for name, weight in model.named_parameters() if name not in known}
    with torch.no_grad():
        for weight in own.values():
            weight.add_(0.3 * torch.randn_like(weight))
    found = {f"leaf/{name}": weight.detach().numpy().copy() for name, weight in own.items()}
    model = model.double().eval()
    mask = batch["mask"] if case.padded else np.ones_like(batch["mask"])
    output = model(torch.tensor(batch["ids"]), attention_mask=torch.tensor(mask)).last_hidden_state
    (output * torch.tensor(batch["cotangent"] * mask[..., None])).sum().backward()
    own = {name: weight for name, weight in model.named_parameters() if f"leaf/{name}" in found}
    for name, weight in own.items():
        if weight.grad is not None:
            found[f"grad/{name}"] = weight.grad.numpy()
    found["output"] = output.detach().numpy()
    chaotic = model.config.model_type == "llama" and any("fusion" in name for name in own)
    if case.trained is not None and not chaotic:
        found |= training(model, {name: weight for name, weight in own.items() if case.trained in name}, batch, mask)
    return found


def training(model: Any, weights: dict[str, Any], batch: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    """The losses of a training, and what the weights are then."""
    inputs = {"ids": batch["ids"], "mask": mask, "target": batch["cotangent"]}
    turned = {name: value[:, ::-1].copy() for name, value in inputs.items()}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in weights)
        if "fusion" in name:
            weight.data *= SHRUNK
    rate, betas, eps, decay = (TRAINING[name] for name in ("rate", "betas", "eps", "decay"))
    optimizer = torch.optim.AdamW(weights.values(), rate, betas, eps, decay)
    losses = []
    for number in range(TRAINING["updates"]):
        ids, seen, target = (torch.tensor(value) for value in (turned if number % 2 else inputs).values())
        optimizer.zero_grad()
        output = model(ids, attention_mask=seen).last_hidden_state
        loss = ((output - target) ** 2)[seen == 1].mean()
        regularizer = model.get_fusion_regularization_loss()
        loss = loss if regularizer is None else loss + regularizer
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": np.array(losses), **{f"trained/{name}": summary(weight) for name, weight in weights.items()}}


def summary(weight: torch.Tensor) -> np.ndarray:
    """Two numbers that tell of all the entries."""
    flat = weight.detach().numpy().astype(np.float64).ravel()
    return np.array([np.linalg.norm(flat), flat @ np.sin(np.arange(flat.size))])


def main() -> None:
    """Writes both files beside this one."""
    warnings.simplefilter("ignore")
    for family, (*_, attributes) in MODELS.items():
        base, batch = base_model(family), inputs()
        weights = {f"base/{name}": weight.detach().numpy() for name, weight in base.named_parameters()}
        found: dict[str, np.ndarray] = {"config": np.array(json.dumps(attributes)), **batch, **weights}
        found["training"] = np.array(json.dumps(TRAINING))
        for name, case in CASES.items():
            if family in case.models:
                found |= {f"{name}/{key}": value for key, value in run(base, case, batch).items()}
        narrow = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in found.items()}
        path = Path(__file__).with_name(f"adapters_{family}.npz")
        np.savez_compressed(path, **narrow)
        sys.stdout.write(f"{path}: {path.stat().st_size:,} bytes, {len(narrow)} arrays\n")


if __name__ == "__main__":
    main()
