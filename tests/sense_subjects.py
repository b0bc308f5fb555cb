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

WHISPER = Subject(
    config={
        "model_type": "whisper", "vocab_size": 53, "num_mel_bins": 5, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 3, "decoder_attention_heads": 4, "encoder_ffn_dim": 29, "decoder_ffn_dim": 37,
        "d_model": 24, "init_std": 0.2, "max_source_positions": 11, "max_target_positions": 19, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "is_encoder_decoder": True,
    },
    variants={
        "base": {},
        "untied": {"tie_word_embeddings": False, "activation_function": "relu", "decoder_layers": 1},
        "other sizes": {
            "num_mel_bins": 4, "max_source_positions": 8, "encoder_layers": 1, "decoder_attention_heads": 1,
            "scale_embedding": True, "activation_function": "gelu_new", "pad_token_id": 7,
        },
    },
    classes={
        "SEQ_2_SEQ_LM": transformers.WhisperForConditionalGeneration,
        "FEATURE_EXTRACTION": transformers.WhisperModel,
    },
    rates=dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), "SEQ_2_SEQ_LM"),
    perturbed={
        name: (value, "SEQ_2_SEQ_LM")
        for name, value in {
            "vocab_size": 54, "num_mel_bins": 6, "encoder_layers": 3, "encoder_attention_heads": 2,
            "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 38, "encoder_ffn_dim": 30,
            "activation_function": "relu", "d_model": 48, "dropout": 0.3, "attention_dropout": 0.3,
            "activation_dropout": 0.3, "max_source_positions": 12, "max_target_positions": 20, "pad_token_id": 5,
            "tie_word_embeddings": False,
        }.items()
    },
    silent=("init_std", "decoder_start_token_id", "num_labels", "model_type", "hf"),
)  # fmt: skip

SUBJECTS = {"vit": VIT, "whisper": WHISPER}
