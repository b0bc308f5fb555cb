# SPDX-License-Identifier: Apache-2.0
"""The real transformers and peft on tiny random models: what jpeft's files are held against."""

import contextlib
import functools
import json
import tempfile
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

import jpeft

_SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}
_BERT = _SMALL | {"num_hidden_layers": 3, "max_position_embeddings": 24, "num_labels": 3}
_DISTILBERT = {"vocab_size": 48, "dim": 16, "hidden_dim": 20, "n_heads": 4, "n_layers": 3, "num_labels": 3}
_DEBERTA = _BERT | {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 4}
_DEBERTA |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3}
_GPT2 = {"vocab_size": 48, "n_embd": 16, "n_inner": 20, "n_head": 4, "n_layer": 3, "n_positions": 24}
_GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_LLAMA = _SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": False}
_LLAMA |= {"num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 32}
_TIED = _LLAMA | {"tie_word_embeddings": True}
_VIT = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_hidden_layers": 3, "num_labels": 3}
_VIT |= {"image_size": 8, "patch_size": 4, "num_channels": 2}
_WHISPER = {"vocab_size": 48, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "num_mel_bins": 4}
_WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 8}
_WHISPER |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_target_positions": 24, "decoder_start_token_id": 1}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 7}

#: name -> (model type, task, attributes of its config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert cls": ("bert", "SEQ_CLS", _BERT),
    "bert tokens": ("bert", "TOKEN_CLS", _BERT),
    "bert answers": ("bert", "QUESTION_ANS", _BERT | {"num_labels": 2}),
    "bert": ("bert", "FEATURE_EXTRACTION", _BERT),
    "roberta cls": ("roberta", "SEQ_CLS", _BERT | {"pad_token_id": 0}),
    "xlm-roberta tokens": ("xlm-roberta", "TOKEN_CLS", _BERT | {"pad_token_id": 0}),
    "deberta": ("deberta-v2", "FEATURE_EXTRACTION", _DEBERTA),
    "distilbert": ("distilbert", "SEQ_CLS", _DISTILBERT | {"max_position_embeddings": 24}),
    "gpt2": ("gpt2", "CAUSAL_LM", _GPT2),
    "llama": ("llama", "CAUSAL_LM", _LLAMA | {"attention_bias": True}),
    "llama tied": ("llama", "CAUSAL_LM", _LLAMA | {"tie_word_embeddings": True}),
    "llama cls": ("llama", "SEQ_CLS", _LLAMA),
    "llama states": ("llama", "FEATURE_EXTRACTION", _LLAMA),
    "mistral": ("mistral", "CAUSAL_LM", _LLAMA | {"sliding_window": 5}),
    "mixtral": ("mixtral", "CAUSAL_LM", _LLAMA | {"sliding_window": 5, "num_local_experts": 3}),
    "qwen2": ("qwen2", "CAUSAL_LM", _LLAMA),
    "gemma2": ("gemma2", "CAUSAL_LM", _LLAMA | {"head_dim": 6, "sliding_window": 3, **_CAPS}),
    "gemma3": (
        "gemma3_text",
        "CAUSAL_LM",
        _TIED | {"head_dim": 6, "sliding_window": 3, "final_logit_softcapping": 2.0},
    ),
    "phi3": ("phi3", "CAUSAL_LM", _LLAMA | {"sliding_window": 5}),
    "t5": ("t5", "SEQ_2_SEQ_LM", _T5 | {"decoder_start_token_id": 0}),
    "vit": ("vit", "IMAGE_CLS", _VIT),
    "whisper": ("whisper", "SEQ_2_SEQ_LM", _WHISPER),
    "qwen3": ("qwen3", "CAUSAL_LM", _LLAMA | {"head_dim": 6}),
}

_AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "IMAGE_CLS": transformers.AutoModelForImageClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}

_RNG = np.random.default_rng(0)
#: Three rows: padded on the right, padded on the left, full.
IDS = _RNG.integers(1, 48, (3, 8))
MASK = np.array([[1] * 5 + [0] * 3, [0] * 2 + [1] * 6, [1] * 8])
IDS[MASK == 0] = 0
_TOKENS = {"input_ids": IDS, "attention_mask": MASK}
#: What models take, by their type, where it is not these rows alone.
_DECODER = {"decoder_input_ids": IDS[::-1].copy(), "decoder_attention_mask": MASK}
_INPUTS: dict[str, dict[str, Any]] = {
    "t5": {**_TOKENS, **_DECODER},
    "whisper": {"input_features": _RNG.standard_normal((3, 4, 16)).astype(np.float32), **_DECODER},
    "vit": {"pixel_values": _RNG.standard_normal((3, 2, 8, 8)).astype(np.float32)},
}
#: What is no type of a task in PEFT, whose own call models with tokens.
UNTYPED = ("vit", "whisper")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Makes every warning an error but those that transformers and peft give in each call, whatever the adapter is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*Norm")  # peft's, of LN_TUNING
        warnings.filterwarnings("ignore", message=r".*_pattern keys .*gate_up_proj'")  # of keys that peft made itself
        warnings.filterwarnings("ignore", category=ResourceWarning)
        yield


def _auto(model_type: str, task: str) -> Any:
    return transformers.AutoModelForSpeechSeq2Seq if model_type == "whisper" else _AUTO[task]


@functools.cache
def folder(family: str) -> Path:
    """The Hugging Face folder of a family's model: random, no bias or norm at its start, outputs of unit size."""
    model_type, task, attributes = FAMILIES[family]
    with quiet():
        config = transformers.AutoConfig.for_model(model_type, **attributes)
        model = _auto(model_type, task).from_config(config)
        one = 0 if model_type.startswith("gemma") else 1  # what its norms scale with is 1 + weight
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            weight.data = one + 0.2 * noise if norm else 0.25 * noise
        path = Path(tempfile.mkdtemp()) / "base"
        model.save_pretrained(path)
    return path


def torch_model(family: str, dtype: Any = torch.float32) -> Any:
    """A fresh torch model, for PEFT changes the one that it is given."""
    with quiet():
        return _auto(*FAMILIES[family][:2]).from_pretrained(folder(family), dtype=dtype).eval()


@functools.cache
def jax_model(family: str) -> Any:
    """The same model in jpeft."""
    return jpeft.models.load(folder(family), FAMILIES[family][1])


def inputs_of(model: Any) -> dict[str, Any]:
    """What a model takes, torch's or jpeft's: three rows."""
    return _INPUTS.get(model.config.model_type, _TOKENS)


def torch_outputs(model: Any, task: str) -> torch.Tensor:
    """Logits `[3, ...]`, or the last hidden state, for `IDS`; those of virtual tokens in front are left out."""
    out = model(**{name: torch.tensor(value) for name, value in inputs_of(model).items()})
    if task == "QUESTION_ANS":
        outputs = torch.stack([out.start_logits, out.end_logits], -1)
    else:
        outputs = out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits
    return outputs[:, -IDS.shape[1] :] if outputs.ndim == 3 else outputs


def jax_outputs(model: Any) -> Any:
    """The same of a jpeft model."""
    return model(**inputs_of(model))


def seen(outputs: Any) -> Any:
    """The outputs at tokens, in one row; what stands at padding is nobody's business."""
    return outputs[MASK == 1] if outputs.ndim == 3 else outputs


def real_outputs(model: Any, family: str) -> np.ndarray:
    """A torch model's outputs at tokens."""
    with torch.no_grad():
        return seen(torch_outputs(model, FAMILIES[family][1]).numpy())


def tensors(folder: Any) -> dict[str, np.ndarray]:
    """Of an adapter's folder."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def config_of(folder: Any) -> dict[str, Any]:
    """adapter_config.json."""
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def load_real(family: str, adapter: Path) -> tuple[Any, Any]:
    """(model, load result): the adapter as peft loads it. A warning is an error; the result lists unknown keys."""
    results = []
    load = peft.PeftModel.load_adapter

    def spy(*args: Any, **options: Any) -> Any:
        results.append(load(*args, **options))
        return results[-1]

    base = torch_model(family)
    with quiet(), unittest.mock.patch.object(peft.PeftModel, "load_adapter", spy):
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    (result,) = results
    return model, result


def train_real(family: str, config: Any, adapter: Path, dtype: Any = torch.float32, noise: float = 0.0) -> Any:
    """Puts an adapter on a torch model, trains it a few steps so that no tensor is at its start, and saves it.

    Args:
      config: one of PEFT's, or the arguments of a LoraConfig.
      noise: added to what is trained before the first step, for a method that leaves its start too slowly.
    """
    torch.manual_seed(1)
    base = torch_model(family, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what some cases here are about
        config = peft.LoraConfig(**config) if isinstance(config, dict) else config
        model_type, task, _ = FAMILIES[family]
        config.task_type = None if model_type in UNTYPED else task
        model = peft.get_peft_model(base, config)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.data += noise * torch.randn_like(weight) if noise else 0
        optimizer = torch.optim.SGD(weights, 0.2)
        for _ in range(3):
            optimizer.zero_grad()
            torch_loss(model, family).backward()
            torch.nn.utils.clip_grad_norm_(weights, 2.0)  # a head of two layers would go far from unit scale
            optimizer.step()
        model.save_pretrained(str(adapter))
    return model.eval()


def cotangent(outputs: Any) -> np.ndarray:
    """Fixed weights of a loss that is linear in the outputs at tokens."""
    weights = np.random.default_rng(2).standard_normal(outputs.shape).astype(np.float32) / outputs.shape[-1]
    return weights * (MASK[..., None] if weights.ndim == 3 else 1)


def torch_loss(model: Any, family: str) -> torch.Tensor:
    """A loss that every output at a token counts in."""
    outputs = torch_outputs(model, FAMILIES[family][1])
    return (outputs * torch.tensor(cotangent(outputs), dtype=outputs.dtype)).sum()
