# SPDX-License-Identifier: Apache-2.0
"""The section `model`: the base."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID

#: The tasks of models that read images.
SEEING = ("IMAGE_CLS",)
#: The tasks of models that name one class for a row.
NAMING = ("SEQ_CLS", *SEEING)

#: The schemes of `jpeft.quantize`, named here as nothing of a configuration imports JAX.
Scheme = Literal[
    "nf4",
    "nf4_double",
    "fp4",
    "fp4_double",
    "int8",
    "int4_32",
    "int4_64",
    "int4_128",
    "int4_32_asymmetric",
    "int4_64_asymmetric",
    "int4_128_asymmetric",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3_tensor",
    "fp8_e5m2_tensor",
]


@dataclasses.dataclass(frozen=True)
class Model:
    """The base model.

    Attributes:
      path: a Hugging Face folder, or an id on the hub.
      task: `SEQ_CLS`, `TOKEN_CLS`, `IMAGE_CLS`, `QUESTION_ANS`, `CAUSAL_LM` or `SEQ_2_SEQ_LM`.
      dtype: of the base's storage and computation; None keeps the checkpoint's. Adapters are float32.
      remat: what a layer keeps for the backward pass: `none`, `dots`, `full`, `names` or `offload`.
      quantize: a scheme of `jpeft.quantize`, such as `nf4_double`, keeps the base's linear layers as codes (QLoRA);
        None as they are. The adapter is used beside the same codes afterwards.
    """

    __pydantic_config__: ClassVar = FORBID
    path: str
    task: Literal["SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM"]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["none", "dots", "full", "names", "offload"] = "none"
    quantize: Scheme | None = None
