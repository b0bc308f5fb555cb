# SPDX-License-Identifier: Apache-2.0
"""The families that read images and sounds, as `zoo_subjects` has those that read tokens."""

import transformers
from zoo_subject import Subject

VIT = Subject(
    config={
        "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 37, "image_size": 12, "patch_size": 4, "num_channels": 2, "initializer_range": 0.2,
    },
    variants={
        "base": {},
        "no biases": {"qkv_bias": False, "hidden_act": "relu", "num_attention_heads": 1, "layer_norm_eps": 1e-2},
        "oblong": {"image_size": [13, 10], "patch_size": [4, 3], "num_channels": 1, "num_hidden_layers": 3},
        "pooler": {"pooler_act": "gelu", "pooler_output_size": 11, "encoder_stride": 4, "hidden_act": "gelu_new"},
    },
    classes={
        "IMAGE_CLS": transformers.ViTForImageClassification,
        "FEATURE_EXTRACTION": transformers.ViTModel,
    },
    rates={"hidden_dropout_prob": "IMAGE_CLS", "attention_probs_dropout_prob": "FEATURE_EXTRACTION"},
    perturbed={
        name: (value, "IMAGE_CLS")
        for name, value in {
            "hidden_size": 27, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 38,
            "hidden_act": "relu", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
            "layer_norm_eps": 1e-3, "image_size": 16, "patch_size": (4, 3), "num_channels": 3, "qkv_bias": False,
            "num_labels": 3,
        }.items()
    } | {"pooler_output_size": (11, "FEATURE_EXTRACTION")},
    silent=("initializer_range", "pooler_act", "model_type", "hf"),
)  # fmt: skip

SUBJECTS = {"vit": VIT}
