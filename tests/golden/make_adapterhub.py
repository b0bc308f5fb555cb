# SPDX-License-Identifier: Apache-2.0
"""Makes adapterhub_*.npz: folders that AdapterHub's `adapters` 1.3.0 saved, and what it computes with them.

It needs the environment of make_adapters.py:

  /tmp/adapters_env/bin/python tests/golden/make_adapterhub.py

A file holds, for one family: `config` (JSON), `base/<name>` its weights, `ids`, `mask`, and per case
`<case>/file/<path>` every file of the folder as bytes, `<case>/base/<name>` weights of the base that the others do
without, and `<case>/output`: the last hidden states, of a model for classification the logits. All was computed in
float64 from weights that are float32 exactly, and rounded to float32.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import adapters  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
import transformers
from adapters import composition  # pyright: ignore[reportMissingImports]

SEED = 0
SEQ = 7
SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
BERT = {**SMALL, "max_position_embeddings": 12, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", {**BERT, "pad_token_id": 0, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 24, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20, "max_position_embeddings": 12,
         "initializer_range": 0.2},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 20, "n_positions": 12, "pad_token_id": 0,
         "initializer_range": 0.2},
    ),
    "llama": (
        "Llama", {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
                  "initializer_range": 0.2},
    ),
    "t5": (
        "T5", {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2,
               "num_heads": 4, "relative_attention_num_buckets": 4, "relative_attention_max_distance": 8,
               "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "initializer_factor": 0.5},
    ),
}  # fmt: skip
EVERY = tuple(FAMILIES)


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder.

    Attributes:
      configs: of the adapter `a`; of several, fused, `a`, `b`, ...
      families: on which it is saved.
      pickled: whether as the library does by default; of some methods it can save nothing else.
      fusion: how several are fused.
      padded: whether with padding; where the library lets padding change the output, without.
      labels: of a classifier; 0 for the backbone.
    """

    configs: tuple[Any, ...]
    families: tuple[str, ...] = ("bert", "llama", "t5")
    pickled: bool = False
    fusion: str = "dynamic"
    padded: bool = True
    labels: int = 0


def one(config: Any, *families: str, **options: Any) -> Case:
    """The case of a single adapter."""
    return Case((config,), *((families,) if families else ()), **options)


PFEIFFER = adapters.SeqBnConfig(reduction_factor=4)
CASES = {
    "pfeiffer": one(PFEIFFER, *EVERY),
    "houlsby": one(adapters.DoubleSeqBnConfig(reduction_factor=8), "bert", "llama", "gpt2", "distilbert"),
    "houlsby with cross": one(adapters.DoubleSeqBnConfig(reduction_factor=8, cross_adapter=True), "t5"),
    "parallel": one(adapters.ParBnConfig(reduction_factor=4, scaling=3.0)),
    "parallel learned": one(adapters.ParBnConfig(reduction_factor=8, scaling="learned", ln_after=True), "bert"),
    "norms": one(
        adapters.SeqBnConfig(
            reduction_factor={"0": 4, "default": 8}, ln_before=True, ln_after=True, scaling="channel"
        ),
        "bert", pickled=True,
    ),
    "factors": one(adapters.SeqBnConfig(reduction_factor={"0": 4, "1": 2}), "llama"),
    "factors of both stacks": one(
        adapters.SeqBnConfig(reduction_factor={"0": 4, "2": 4, "default": 8}), "t5"
    ),
    "residual after": one(
        adapters.SeqBnConfig(reduction_factor=8, residual_before_ln=False, leave_out=[0], non_linearity="gelu"), "bert"
    ),
    "norm of the sum": one(
        adapters.DoubleSeqBnConfig(reduction_factor=8, ln_after=True, adapter_residual_before_ln=True), "bert"
    ),
    "gate": one(adapters.SeqBnConfig(reduction_factor=8, use_gating=True), "bert", padded=False),
    "coupling": one(adapters.SeqBnInvConfig(reduction_factor=8), "llama"),
    # Of a backbone alone the library saves no shared rule, so these are classifiers.
    "compacter": one(adapters.CompacterConfig(reduction_factor=4), "bert", "llama", labels=3),
    "compacter++": one(
        adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, phm_rank=2), "bert", labels=3
    ),
    "prefix": one(
        adapters.PrefixTuningConfig(flat=True, prefix_length=3),
        "bert", "roberta", "gpt2", "llama", pickled=True,
    ),
    "prefix by a projection": one(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5), "bert", "llama", pickled=True
    ),
    "lora": one(adapters.LoRAConfig(r=3, alpha=7), "bert", "roberta", "distilbert", "llama", "t5"),
    "lora everywhere": one(
        adapters.LoRAConfig(
            r=2, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[0]
        )
    ),
    "lora of the mlp": one(
        adapters.LoRAConfig(r=2, alpha=5, selfattn_lora=False, intermediate_lora=True, output_lora=True), "gpt2"
    ),
    "ia3": one(adapters.IA3Config(), "bert", "distilbert", "llama", "t5"),
    "ia3 of all three": one(adapters.IA3Config(attn_matrices=["q", "k", "v"]), "gpt2"),
    "loreft": one(
        adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1, tied_weights=True, dropout=0.0),
        "bert", "llama",
    ),
    "noreft": one(adapters.NoReftConfig(r=2, prefix_positions=2, suffix_positions=2, layers=[1]), "bert", "llama"),
    # Of an encoder-decoder the library takes the decoder's positions from the encoder's mask, so here is none.
    "noreft of both stacks": one(
        adapters.NoReftConfig(r=2, prefix_positions=2, suffix_positions=1, layers=[1, 3]), "t5", padded=False
    ),
    "noreft of one end": one(adapters.NoReftConfig(r=2, prefix_positions=2, dropout=0.0), "bert"),
    "direft": one(adapters.DiReftConfig(r=2, prefix_positions=2, tied_weights=True, dropout=0.0), "bert", "llama"),
    "mam": one(
        adapters.MAMConfig(
            adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5), adapters.ParBnConfig(reduction_factor=4)
        ),
        "bert", "gpt2", pickled=True,
    ),
    "mam of a flat prefix": one(
        adapters.MAMConfig(
            adapters.PrefixTuningConfig(flat=True, prefix_length=3), adapters.ParBnConfig(reduction_factor=4)
        ),
        "llama", pickled=True, labels=3,
    ),
    # A gate is a mean over padding too, so here is none.
    "unipelt": one(
        adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5), PFEIFFER, adapters.LoRAConfig(r=2, alpha=2)
        ),
        "bert", "roberta", pickled=True, padded=False,
    ),
    "unipelt of a flat prefix": one(
        adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(flat=True, prefix_length=3), PFEIFFER, adapters.LoRAConfig(r=2, alpha=7)
        ),
        "llama", pickled=True, padded=False, labels=3,
    ),
    "prefix beside a parallel adapter": one(
        adapters.ConfigUnion(
            adapters.PrefixTuningConfig(flat=True, prefix_length=2), adapters.ParBnConfig(reduction_factor=8)
        ),
        "roberta", pickled=True,
    ),
    "adapters of two sorts and reft": one(
        adapters.ConfigUnion(
            adapters.BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=8, non_linearity="relu"),
            adapters.ParBnConfig(reduction_factor=4),
            adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1, tied_weights=True, dropout=0.0),
        ),
        "bert",
    ),
    "ia3 and an adapter": one(adapters.ConfigUnion(PFEIFFER, adapters.IA3Config()), "t5", "distilbert"),
    "one sort for each layer": one(
        adapters.ConfigUnion(
            adapters.SeqBnConfig(reduction_factor=4, leave_out=[0]),
            adapters.ParBnConfig(reduction_factor=8, leave_out=[1]), adapters.LoRAConfig(r=2, alpha=5),
        ),
        "bert", labels=3,
    ),
    "fusion": Case((PFEIFFER, adapters.SeqBnConfig(reduction_factor=8, non_linearity="gelu"))),
    "static fusion": Case(
        tuple(adapters.DoubleSeqBnConfig(reduction_factor=f) for f in (8, 16, 4)), ("bert",), fusion="static"
    ),
    "classifier": one(PFEIFFER, "bert", "roberta", "distilbert", "llama", "gpt2", labels=3),
}  # fmt: skip


def base_model(family: str, labels: int) -> Any:
    """A model whose every weight is random, norms and biases too; the backbone is the same whatever its head."""
    prefix, attributes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**attributes)
    torch.manual_seed(SEED)
    options = {} if prefix in ("GPT2", "Llama", "T5", "DistilBert") else {"add_pooling_layer": False}
    model = getattr(transformers, f"{prefix}Model")(config, **options)
    perturb(model)
    if not labels:
        return model
    config.num_labels = labels
    whole = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    perturb(whole)
    whole.base_model.load_state_dict(model.state_dict(), strict=False)
    return whole


def perturb(model: Any) -> None:
    """Norms off one, biases off zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
                weight.add_(0.2 * torch.randn_like(weight))


def inputs() -> dict[str, np.ndarray]:
    """Three rows: padded on the right, padded on the left, full."""
    mask = np.array([[1] * 5 + [0] * 2, [0] * 3 + [1] * 4, [1] * SEQ])
    return {"ids": np.random.default_rng(SEED).integers(1, SMALL["vocab_size"], mask.shape) * mask, "mask": mask}


def add(model: Any, case: Case) -> Any:
    """Puts the case's adapters on a model, active; returns what is to be saved."""
    names = [chr(ord("a") + i) for i in range(len(case.configs))]
    for name, config in zip(names, case.configs, strict=True):
        model.add_adapter(name, config=config)
    setup = composition.Fuse(*names) if len(names) > 1 else names[0]
    if len(names) > 1:
        model.add_adapter_fusion(setup, case.fusion)
    model.set_active_adapters(setup)
    parts = getattr(case.configs[0], "configs", case.configs)
    if any(isinstance(part, adapters.PrefixTuningConfig) for part in parts):
        model.set_attn_implementation("eager")  # whose mask is added, so that a prefix's zeros are seen
    return setup


def randomize(model: Any, known: set[str]) -> None:
    """Moves every weight of the adapters off its start."""
    torch.manual_seed(SEED + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in known:
                noise = 0.3 * torch.randn_like(weight)
                # Off its diagonal of -1 torch's parametrisation of an orthogonal matrix is lost: it rounds -0.999 to 0.
                weight.add_(torch.triu(noise, 1) if name.endswith("weight.original") else noise)


def output(model: Any, batch: dict[str, np.ndarray], padded: bool) -> np.ndarray:
    """The last hidden states, or the logits, in float64; a model of two stacks reads the rows in both, turned round."""
    model = model.double().eval()
    given = {"input_ids": torch.tensor(batch["ids"])} | (
        {"attention_mask": torch.tensor(batch["mask"])} if padded else {}
    )
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor(batch["ids"][:, ::-1].copy())
    torch.set_default_dtype(torch.float64)  # some tensors of the library are of no other
    with torch.no_grad():
        out = model(**given)
    torch.set_default_dtype(torch.float32)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def run(family: str, case: Case, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The files and the output of one case."""
    model = base_model(family, case.labels)
    known = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    setup = add(model, case)
    randomize(model, known)
    found = {f"base/{name}": weight.detach().numpy() for name, weight in model.named_parameters() if "pooler" in name}
    with tempfile.TemporaryDirectory() as folder:
        save(model, setup, folder, case)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                found[f"file/{file.relative_to(folder)}"] = np.frombuffer(file.read_bytes(), np.uint8)
    found["output"] = output(model, batch, case.padded)
    return found


def save(model: Any, setup: Any, folder: str, case: Case) -> None:
    """As the library's users save."""
    options = {"use_safetensors": not case.pickled}
    if isinstance(setup, str):
        model.save_adapter(folder, setup, **options)
    else:
        model.save_adapter_setup(folder, setup, **options)


def main() -> None:
    """Writes all files beside this one."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for family, (_, attributes) in FAMILIES.items():
        batch = inputs()
        base = base_model(family, 0)
        weights = {f"base/{name}": weight.detach().numpy() for name, weight in base.named_parameters()}
        found: dict[str, np.ndarray] = {
            "config": np.array(json.dumps({"model_type": family, **attributes})), **batch, **weights,
        }  # fmt: skip
        for name, case in CASES.items():
            if family in case.families:
                found |= {f"{name}/{key}": value for key, value in run(family, case, batch).items()}
        narrow = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in found.items()}
        path = Path(__file__).with_name(f"adapterhub_{family}.npz")
        np.savez_compressed(path, **narrow)
        sys.stdout.write(f"{path}: {path.stat().st_size:,} bytes, {len(narrow)} arrays\n")


if __name__ == "__main__":
    main()
