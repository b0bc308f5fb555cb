# SPDX-License-Identifier: Apache-2.0
"""One train step of every family of the zoo beside transformers + peft: same shapes, same cores, float32, one run.

    python benchmarks/families.py [--families bert t5 ...] [--methods lora full ...] [--cores 2] [--json FILE]

Every family at about the same size (6 layers, d=512, 8 heads, 8 rows of 128 tokens, random weights), with the head
that it is trained with: classes for encoders and images, the next token for decoders, the written text for
encoder-decoders. A step is forward, loss, backward, AdamW; jpeft's and peft's take turns, and a LoRA step of jpeft's
between. Prints, per family and method: milliseconds, the ratio of the rates, peak memory of both and their ratio, the
time as a share of jpeft's own LoRA step's, compile time.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from _sides import Side, pin, serve, take_turns
from methods import timed

RANK, ALPHA, RATE = 8, 16, 1e-4
ROWS, SEQ, OUT, VOCAB = 8, 128, 32, 16_000
D, FF, LAYERS, HEADS = 512, 2048, 6, 8

_BERT = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": FF, "max_position_embeddings": 514, "type_vocab_size": 2, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2, "intermediate_size": 1408, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = _DECODER | {"head_dim": 64, "sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}

#: Model type -> its config, and transformers' class.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (_BERT, "BertForSequenceClassification"),
    "roberta": (_BERT, "RobertaForSequenceClassification"),
    "distilbert": (
        {
            "vocab_size": VOCAB, "dim": D, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FF, "pad_token_id": 0,
            "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
        },
        "DistilBertForSequenceClassification",
    ),
    "deberta-v2": (
        _BERT | {
            "relative_attention": True, "position_buckets": 64, "max_relative_positions": -1, "type_vocab_size": 0,
            "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        "DebertaV2ForSequenceClassification",
    ),
    "gpt2": (
        {
            "vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        },
        "GPT2LMHeadModel",
    ),
    "llama": (_DECODER, "LlamaForCausalLM"),
    "qwen3": (_DECODER | {"head_dim": 64}, "Qwen3ForCausalLM"),
    "gemma2": (_GEMMA, "Gemma2ForCausalLM"),
    "gemma3_text": (_GEMMA, "Gemma3ForCausalLM"),
    "phi3": (_DECODER | {"original_max_position_embeddings": 2048, "resid_pdrop": 0.0}, "Phi3ForCausalLM"),
    "mixtral": (_DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}, "MixtralForCausalLM"),
    "t5": (
        {
            "vocab_size": VOCAB, "d_model": D, "d_kv": D // HEADS, "d_ff": FF, "num_layers": LAYERS,
            "num_heads": HEADS, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
            "decoder_start_token_id": 0, "is_encoder_decoder": True,
        },
        "T5ForConditionalGeneration",
    ),
    "vit": (
        {
            "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FF,
            "image_size": 176, "patch_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "num_labels": 2,
        },
        "ViTForImageClassification",
    ),
    "whisper": (
        {
            "vocab_size": VOCAB, "d_model": D, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FF,
            "decoder_ffn_dim": FF, "num_mel_bins": 80, "max_source_positions": SEQ, "max_target_positions": 64,
            "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 3,
        },
        "WhisperForConditionalGeneration",
    ),
}  # fmt: skip

#: Query and value of every family, as its checkpoints name them.
QUERY_VALUE = {
    "bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"],
    "deberta-v2": ["query_proj", "value_proj"], "gpt2": ["c_attn"], "phi3": ["qkv_proj"], "t5": ["q", "v"],
}  # fmt: skip
METHODS = ("lora", "dora", "full")


def config_of(family: str) -> dict[str, Any]:
    """The family's whole config."""
    config, architecture = FAMILIES[family]
    return {**config, "model_type": family, "architectures": [architecture]}


def targets_of(family: str) -> list[str]:
    """What LoRA and DoRA sit on."""
    return QUERY_VALUE.get(family, ["q_proj", "v_proj"])


def batch_of(family: str) -> dict[str, Any]:
    """The same random inputs and labels for both sides, no padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    architecture = FAMILIES[family][1]
    if family == "vit":
        images = rng.standard_normal((ROWS, 3, 176, 176), np.float32)
        return {"pixel_values": images, "labels": rng.integers(0, 2, (ROWS,))}
    if family == "whisper":
        sounds = rng.standard_normal((ROWS, 80, 2 * SEQ), np.float32)
        return {"input_features": sounds, "labels": rng.integers(4, VOCAB, (ROWS, OUT))}
    ids = rng.integers(4, VOCAB, (ROWS, SEQ))
    if architecture.endswith("ForSequenceClassification"):
        labels = rng.integers(0, 2, (ROWS,))
    else:
        labels = rng.integers(4, VOCAB, (ROWS, OUT)) if family == "t5" else ids
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def prepare_jpeft(family: str, method: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds the family's model in jpeft and compiles its step."""
    pin()
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft.train.losses import SUMS
    from jpeft.train.step import begin, make_step

    targets = targets_of(family)
    methods = {
        "lora": jpeft.LoRA(rank=RANK, alpha=ALPHA, targets=targets),
        "dora": jpeft.DoRA(rank=RANK, alpha=ALPHA, targets=targets),
        "full": jpeft.FullFineTune(),
    }
    model = jpeft.models.build(config_of(family), key=jax.random.key(0))
    model = jpeft.adapt(model, methods[method], key=jax.random.key(1))
    sums, trained = SUMS[model.task], jpeft.summary(model).trainable
    graphdef, trainable, frozen = jpeft.partition(model)
    del model
    tx = optax.adamw(RATE)
    update = make_step(graphdef, sums, tx)
    held = [begin(tx, trainable)]
    arrays = {name: jnp.asarray(x)[None] for name, x in batch_of(family).items()}
    batch = {name: x.astype("int32") if x.dtype.kind == "i" else x for name, x in arrays.items()}

    def step() -> None:
        held[0], metrics = update(held[0], frozen, batch, None)
        metrics.loss.block_until_ready()

    step()
    return {"compile": update.compile_seconds, "trained": trained}, lambda steps: timed(step, steps)


def prepare_peft(family: str, method: str) -> tuple[dict[str, Any], Callable[[int], list[float]]]:
    """Builds it in transformers + peft, eager."""
    cores = pin()
    import peft
    import torch
    import transformers

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    config, architecture = FAMILIES[family]
    hf = transformers.AutoConfig.for_model(family, **config)
    made: Any = getattr(transformers, architecture)(hf)
    if method != "full":
        classes = architecture.endswith("Classification")
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets_of(family), use_dora=method == "dora")
        lora.modules_to_save = ["classifier", "pre_classifier"] if classes else None  # a head is trained whole
        made = peft.get_peft_model(made, lora)
    made.train()
    batch = {name: torch.from_numpy(value) for name, value in batch_of(family).items()}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        made(**batch).loss.backward()
        optimizer.step()

    step()
    return {"trained": sum(p.numel() for p in trained)}, lambda steps: timed(step, steps)


PREPARE = {"jpeft": prepare_jpeft, "peft": prepare_peft}


def measure(family: str, method: str, cores: list[int], steps: int, repeats: int) -> dict[str, Any]:
    """One method on one family, beside peft's and a LoRA step of jpeft's."""
    sides = [Side(__file__, name, f"{family}:{method}", cores) for name in PREPARE]
    if method != "lora":
        sides.append(Side(__file__, "jpeft", f"{family}:lora", cores))
        sides[-1].name = "lora"
    result: dict[str, Any] = take_turns(sides, steps, repeats)
    result |= sides[0].start
    for side in sides:
        side.close()
    seconds = {name: result[name]["seconds"] for name in ("jpeft", "peft")}
    result["of_peft"] = seconds["peft"] / seconds["jpeft"]
    result["memory"] = result["jpeft"]["peak_mb"] / result["peft"]["peak_mb"]
    result["of_lora"] = seconds["jpeft"] / result["lora"]["seconds"] if "lora" in result else None
    return result


def line(family: str, method: str, result: dict[str, Any]) -> str:
    """The row of the table."""
    lora = "-" if result["of_lora"] is None else f"{result['of_lora']:.2f}"
    ours, theirs = result["jpeft"], result["peft"]
    return (
        f"| {family} | {method} | {result['trained']:,} | {1000 * ours['seconds']:.0f} | "
        f"{1000 * theirs['seconds']:.0f} | {result['of_peft']:.2f} | {ours['peak_mb']:.0f} | {theirs['peak_mb']:.0f} | "
        f"{result['memory']:.2f} | {lora} | {result['compile']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        side, case = options.worker
        return serve(lambda: PREPARE[side](*case.split(":")))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    print("| family | method | trained | ms | PEFT's ms | x PEFT's rate | peak MB | PEFT's | ratio | of LoRA's time "
          "| compile s |")  # fmt: skip
    print("|---|---" + 9 * "|---:" + "|")
    results: dict[str, dict[str, Any]] = {}
    for family in options.families:
        for method in options.methods:
            result = measure(family, method, cores, options.steps, options.repeats)
            results.setdefault(family, {})[method] = result
            print(line(family, method, result), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
