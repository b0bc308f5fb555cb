# SPDX-License-Identifier: Apache-2.0
"""Which file models of a type are in, and what transformers calls their classes."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ._config import check_values


@dataclasses.dataclass(frozen=True)
class Family:
    """The models of one type: the file here, its class, and how transformers' class names start and (unusually) end.

    An ending of None says that transformers has no class for the task.

    The file defines Config (with `from_hf`, `to_hf`), the class, WEIGHTS(config, task), TASKS, PREFIXES (what
    checkpoints with a head put before the backbone's names) and HEADS (modules that some tasks have and others lack);
    and may define OPTIONAL (modules that a checkpoint of the task itself may lack).

    `reads` is the first argument of a call: tokens, or what an image or a sound was made into.
    """

    file: str
    model: str
    prefix: str
    endings: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    reads: str = "input_ids"

    def architecture(self, task: str) -> str | None:
        """transformers' class for a task; None where it has none."""
        ending = ({**ENDINGS, **self.endings})[task]
        return ending and self.prefix + ending

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the models are for."""
        return tuple(task for task in self.module.TASKS if self.architecture(task))

    @property
    def module(self) -> Any:
        """The file as a module, imported when it is first needed."""
        return importlib.import_module(f".{self.file}", __package__)

    def config(self, hf: Mapping[str, Any]) -> Any:
        """The Config that a config.json says.

        Raises:
          ValueError: an attribute that is unknown, has no possible value, or asks for what is not supported.
        """
        check_values(self.module.Config, hf)
        return self.module.Config.from_hf(hf)

    def abstract(self, config: Any, task: str, options: Mapping[str, Any]) -> Any:
        """The model with shapes in the place of arrays."""
        return nnx.eval_shape(lambda: self.make(config, task, jax.random.key(0), options))

    def make(self, config: Any, task: str, key: jax.Array, options: Mapping[str, Any]) -> Any:
        """The model with its first values."""
        return getattr(self.module, self.model)(config, task, rngs=nnx.Rngs(key), **options)


#: transformers has Gemma 3 with images and without; the classes of the latter say so, but for that of CAUSAL_LM.
_GEMMA3 = {
    "SEQ_CLS": "TextForSequenceClassification",
    "TOKEN_CLS": None,
    "FEATURE_EXTRACTION": "TextModel",
}

FAMILIES = {
    "bert": Family("bert", "Bert", "Bert"),
    "deberta-v2": Family("deberta", "Deberta", "DebertaV2"),
    "distilbert": Family("distilbert", "DistilBert", "DistilBert"),
    "gemma2": Family("gemma", "Gemma", "Gemma2"),
    "gemma3_text": Family("gemma", "Gemma", "Gemma3", _GEMMA3),
    "gpt2": Family("gpt2", "GPT2", "GPT2", {"CAUSAL_LM": "LMHeadModel"}),
    "llama": Family("llama", "Llama", "Llama"),
    "mistral": Family("llama", "Llama", "Mistral"),
    "mixtral": Family("mixtral", "Mixtral", "Mixtral"),
    "phi3": Family("phi3", "Phi3", "Phi3"),
    "qwen2": Family("llama", "Llama", "Qwen2"),
    "qwen3": Family("llama", "Llama", "Qwen3"),
    "roberta": Family("bert", "Bert", "Roberta"),
    "t5": Family("t5", "T5", "T5"),
    "vit": Family("vit", "ViT", "ViT", reads="pixel_values"),
    "whisper": Family("whisper", "Whisper", "Whisper", reads="input_features"),
    "xlm-roberta": Family("bert", "Bert", "XLMRoberta"),
}

#: Names of tasks, PEFT's where it has one, and how the names of transformers' classes for them end.
ENDINGS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "MULTIPLE_CHOICE": "ForMultipleChoice",
    "IMAGE_CLS": "ForImageClassification",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}

#: The tasks whose head has `num_labels` outputs.
LABELLED = ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS")


def presets() -> dict[str, Any]:
    """The published shapes that the zoo knows, by name: a Config each, for `jpeft.models.build`.

    Example:
      >>> {name: num_parameters(config) for name, config in presets().items()}
    """
    modules = {family.file: family.module for family in FAMILIES.values()}
    return {name: config for module in modules.values() for name, config in module.PRESETS.items()}


def preset(name: str) -> Any:
    """The Config of a published shape.

    Raises:
      ValueError: the zoo knows none of this name.
    """
    found = presets()
    if name not in found:
        close = difflib.get_close_matches(name.lower(), found, 4, 0.4) or [*found]
        raise ValueError(
            f"{name!r} is no preset; nearest: {', '.join(close)} (jpeft.models.presets() has all; a folder is "
            "read by jpeft.models.load)"
        )
    return found[name]


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json is of; a model type that the zoo lacks is refused by name."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type {model_type!r}; the zoo has {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def saved_task(hf: Mapping[str, Any]) -> str | None:
    """The task of the config's architecture; None where it names none, or one that is no task."""
    architectures = hf.get("architectures")
    named = architectures[0] if isinstance(architectures, (list, tuple)) and architectures else None
    return task_of(hf, named)


def task_of(hf: Mapping[str, Any], architecture: str | None) -> str | None:
    """The task of transformers' class `architecture` of the config's models; None where it is no task."""
    return next((task for task in ENDINGS if architecture == family_of(hf).architecture(task)), None)
