# SPDX-License-Identifier: Apache-2.0
"""The families that the tests of the zoo go through: a tiny config of each, and what may be changed of it."""

import dataclasses

import sense_subjects
import transformers
from zoo_subject import Subject

DISTILBERT = Subject(
    config={
        "model_type": "distilbert", "vocab_size": 53, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 37,
        "max_position_embeddings": 19, "initializer_range": 0.2, "pad_token_id": 0, "dropout": 0.0,
        "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
    variants={
        "base": {},
        "relu": {"activation": "relu", "pad_token_id": 7, "n_layers": 3, "n_heads": 1},
        "gelu_new": {"activation": "gelu_new", "sinusoidal_pos_embds": True, "pad_token_id": None, "n_heads": 6},
    },
    classes={
        "SEQ_CLS": transformers.DistilBertForSequenceClassification,
        "TOKEN_CLS": transformers.DistilBertForTokenClassification,
        "QUESTION_ANS": transformers.DistilBertForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.DistilBertModel,
    },
    rates={
        "dropout": "TOKEN_CLS", "attention_dropout": "TOKEN_CLS", "qa_dropout": "QUESTION_ANS",
        "seq_classif_dropout": "SEQ_CLS",
    },
    perturbed={
        "vocab_size": (54, "SEQ_CLS"), "dim": (27, "SEQ_CLS"), "n_layers": (3, "SEQ_CLS"), "n_heads": (4, "SEQ_CLS"),
        "hidden_dim": (38, "SEQ_CLS"), "activation": ("relu", "SEQ_CLS"), "max_position_embeddings": (20, "SEQ_CLS"),
        "dropout": (0.3, "SEQ_CLS"), "attention_dropout": (0.3, "SEQ_CLS"), "qa_dropout": (0.3, "QUESTION_ANS"),
        "seq_classif_dropout": (0.3, "SEQ_CLS"), "pad_token_id": (5, "SEQ_CLS"), "num_labels": (3, "SEQ_CLS"),
    },
    silent=("initializer_range", "sinusoidal_pos_embds", "model_type", "hf"),
)  # fmt: skip

GPT2 = Subject(
    config={
        "model_type": "gpt2", "vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 37,
        "n_positions": 19, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0,
    },
    variants={
        "base": {},
        "scores as they are": {"scale_attn_weights": False, "n_inner": None, "layer_norm_epsilon": 1e-2},
        "scores by layer": {
            "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3,
            "activation_function": "relu", "n_head": 1,
        },
        "untied": {"tie_word_embeddings": False},
    },
    classes={
        "CAUSAL_LM": transformers.GPT2LMHeadModel,
        "SEQ_CLS": transformers.GPT2ForSequenceClassification,
        "TOKEN_CLS": transformers.GPT2ForTokenClassification,
        "QUESTION_ANS": transformers.GPT2ForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.GPT2Model,
    },
    rates={
        "resid_pdrop": "CAUSAL_LM", "embd_pdrop": "CAUSAL_LM", "attn_pdrop": "CAUSAL_LM",
        "classifier_dropout": "TOKEN_CLS",
    },
    perturbed={
        "vocab_size": (54, "SEQ_CLS"), "n_positions": (20, "SEQ_CLS"), "n_embd": (27, "SEQ_CLS"),
        "n_layer": (3, "SEQ_CLS"), "n_head": (4, "SEQ_CLS"), "n_inner": (None, "SEQ_CLS"),
        "activation_function": ("relu", "SEQ_CLS"), "resid_pdrop": (0.3, "SEQ_CLS"), "embd_pdrop": (0.3, "SEQ_CLS"),
        "attn_pdrop": (0.3, "SEQ_CLS"), "classifier_dropout": (None, "TOKEN_CLS"),
        "layer_norm_epsilon": (1e-3, "SEQ_CLS"), "scale_attn_weights": (False, "SEQ_CLS"),
        "scale_attn_by_inverse_layer_idx": (True, "SEQ_CLS"), "tie_word_embeddings": (False, "CAUSAL_LM"),
        "pad_token_id": (5, "SEQ_CLS"), "num_labels": (3, "SEQ_CLS"),
    },
    causal=True,
)  # fmt: skip

T5 = Subject(
    config={
        "model_type": "t5", "vocab_size": 53, "d_model": 24, "d_kv": 10, "d_ff": 37, "num_layers": 2, "num_heads": 3,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11, "dropout_rate": 0.0,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "is_encoder_decoder": True,
    },
    variants={
        "base": {},
        "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
        "few buckets": {
            "feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "layer_norm_epsilon": 0.1, "num_heads": 1,
            "relative_attention_num_buckets": 4, "relative_attention_max_distance": 5,
        },
    },
    classes={"SEQ_2_SEQ_LM": transformers.T5ForConditionalGeneration, "FEATURE_EXTRACTION": transformers.T5Model},
    rates={"dropout_rate": "SEQ_2_SEQ_LM"},
    perturbed={
        name: (value, "SEQ_2_SEQ_LM")
        for name, value in {
            "vocab_size": 54, "d_model": 27, "d_kv": 11, "d_ff": 38, "num_layers": 3, "num_decoder_layers": 3,
            "num_heads": 4, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
            "dropout_rate": 0.3, "layer_norm_epsilon": 1e-3, "feed_forward_proj": "gated-relu",
            "tie_word_embeddings": False,
        }.items()
    },
    silent=("initializer_factor", "pad_token_id", "decoder_start_token_id", "num_labels", "model_type", "hf"),
)  # fmt: skip

ROBERTA = Subject(
    config={
        "model_type": "roberta", "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 2, "initializer_range": 0.2,
        "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0,
    },
    variants={
        "base": {},
        "padding in the text": {"pad_token_id": 4, "hidden_act": "relu", "num_attention_heads": 1},
        "gelu_new": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "num_hidden_layers": 3},
    },
    classes={
        "SEQ_CLS": transformers.RobertaForSequenceClassification,
        "TOKEN_CLS": transformers.RobertaForTokenClassification,
        "QUESTION_ANS": transformers.RobertaForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.RobertaModel,
    },
    rates={
        "hidden_dropout_prob": "TOKEN_CLS", "attention_probs_dropout_prob": "QUESTION_ANS",
        "classifier_dropout": "SEQ_CLS",
    },
    perturbed={
        name: (value, "SEQ_CLS")
        for name, value in {
            "vocab_size": 54, "hidden_size": 27, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 38, "hidden_act": "relu", "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4, "max_position_embeddings": 20,
            "type_vocab_size": 3, "layer_norm_eps": 1e-3, "pad_token_id": 5, "num_labels": 3, "model_type": "bert",
        }.items()
    },
    silent=("initializer_range", "hf"),
)  # fmt: skip

XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    config={**ROBERTA.config, "model_type": "xlm-roberta"},
    variants={"base": {}},
    classes={
        "SEQ_CLS": transformers.XLMRobertaForSequenceClassification,
        "TOKEN_CLS": transformers.XLMRobertaForTokenClassification,
        "QUESTION_ANS": transformers.XLMRobertaForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.XLMRobertaModel,
    },
    rates={},
)

_CONV = {"conv_kernel_size": 3}
DEBERTA = Subject(
    config={
        "model_type": "deberta-v2", "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 2,
        "initializer_range": 0.2, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "relative_attention": True, "position_buckets": 6, "max_relative_positions": 9, "pos_att_type": "p2c|c2p",
    },
    variants={
        "base": {},
        "v3": {
            "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
            "max_relative_positions": -1, "num_attention_heads": 1, "hidden_act": "relu",
        },
        "v2 xlarge": {
            "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_act": "gelu",
            "conv_kernel_size": 3, "attention_head_size": 8, "num_hidden_layers": 3, "layer_norm_eps": 1e-2,
        },
        "c2p": {
            "pos_att_type": ["c2p"], "position_buckets": 16, "max_relative_positions": 12, "conv_kernel_size": 5,
            "conv_groups": 4, "pooler_hidden_act": "tanh",
        },
        "p2c": {"pos_att_type": ["p2c"], "position_buckets": -1, "embedding_size": 10, "pad_token_id": None},
        "shared c2p": {
            "pos_att_type": ["c2p"], "share_att_key": True, "max_relative_positions": 4, "position_buckets": -1,
            "embedding_size": 31,
        },
        "unscored": {"pos_att_type": [], "norm_rel_ebd": "layer_norm", "conv_kernel_size": 1},
        "absolute": {"relative_attention": False, "conv_kernel_size": 3},
    },
    classes={
        "TOKEN_CLS": transformers.DebertaV2ForTokenClassification,
        "SEQ_CLS": transformers.DebertaV2ForSequenceClassification,
        "QUESTION_ANS": transformers.DebertaV2ForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.DebertaV2Model,
    },
    rates={
        "hidden_dropout_prob": "QUESTION_ANS", "attention_probs_dropout_prob": "TOKEN_CLS", "cls_dropout": "SEQ_CLS",
        "pooler_dropout": "SEQ_CLS",
    },
    perturbed={
        name: (value, "SEQ_CLS")
        for name, value in {
            "vocab_size": 54, "hidden_size": 27, "embedding_size": 10, "num_hidden_layers": 3,
            "num_attention_heads": 4, "intermediate_size": 38, "hidden_act": "relu", "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.3, "max_position_embeddings": 20, "position_biased_input": False,
            "type_vocab_size": 0, "relative_attention": False, "max_relative_positions": 10, "position_buckets": 8,
            "pos_att_type": ("p2c",), "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 1,
            "pooler_dropout": 0.3, "pooler_hidden_act": "relu", "cls_dropout": 0.3, "layer_norm_eps": 1e-3,
            "pad_token_id": 5, "num_labels": 3,
        }.items()
    } | {"conv_groups": (4, "SEQ_CLS", _CONV), "conv_act": ("relu", "SEQ_CLS", _CONV)},
    silent=("initializer_range", "model_type", "hf"),
)  # fmt: skip

_DECODER = {
    "vocab_size": (54, "CAUSAL_LM"), "hidden_size": (32, "CAUSAL_LM"), "intermediate_size": (38, "CAUSAL_LM"),
    "num_hidden_layers": (4, "CAUSAL_LM"), "num_attention_heads": (2, "CAUSAL_LM"),
    "num_key_value_heads": (4, "CAUSAL_LM"), "head_dim": (12, "CAUSAL_LM"), "rms_norm_eps": (1e-3, "CAUSAL_LM"),
    "rope_theta": (20.0, "CAUSAL_LM"), "rope_scaling": ((("rope_type", "linear"), ("factor", 2.0)), "CAUSAL_LM"),
    "attention_dropout": (0.1, "CAUSAL_LM"), "sliding_window": (5, "CAUSAL_LM"), "pad_token_id": (5, "CAUSAL_LM"),
    "num_labels": (3, "SEQ_CLS"),
}  # fmt: skip

_GEMMA = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "initializer_range": 0.2,
    "query_pre_attn_scalar": 7, "sliding_window": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_DYNAMIC = {"rope_scaling": (("rope_type", "dynamic"), ("factor", 2.0))}

GEMMA2 = Subject(
    config=_GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    variants={
        "base": {},
        "no caps": {
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
        },
        "relu": {
            "hidden_activation": "relu", "num_key_value_heads": 1, "rms_norm_eps": 0.5, "query_pre_attn_scalar": 30,
            "num_hidden_layers": 1, "hidden_act": "silu", "cache_implementation": "hybrid",
        },
    },
    classes={
        "CAUSAL_LM": transformers.Gemma2ForCausalLM,
        "SEQ_CLS": transformers.Gemma2ForSequenceClassification,
        "TOKEN_CLS": transformers.Gemma2ForTokenClassification,
        "FEATURE_EXTRACTION": transformers.Gemma2Model,
    },
    rates={"attention_dropout": "CAUSAL_LM"},
    perturbed=_DECODER | {
        "hidden_activation": ("relu", "CAUSAL_LM"), "max_position_embeddings": (7, "CAUSAL_LM", _DYNAMIC),
        "tie_word_embeddings": (False, "CAUSAL_LM"), "attention_bias": (True, "CAUSAL_LM"),
        "query_pre_attn_scalar": (9, "CAUSAL_LM"), "attn_logit_softcapping": (3.0, "CAUSAL_LM"),
        "final_logit_softcapping": (None, "CAUSAL_LM"), "layer_types": (("full_attention",) * 3, "CAUSAL_LM"),
        "classifier_dropout": (0.4, "TOKEN_CLS"), "token_classification_bias": (False, "TOKEN_CLS"),
        "model_type": ("gemma3_text", "CAUSAL_LM", {"attn_logit_softcapping": None}),
    },
    causal=True,
    silent=("initializer_range", "rope_local_base_freq", "sliding_window_pattern", "hf"),
)  # fmt: skip

_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 70.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
GEMMA3 = Subject(
    config=_GEMMA | {
        "model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_theta": 300.0, "rope_local_base_freq": 20.0,
    },
    variants={
        "base": {},
        "both ropes": {
            "rope_parameters": _ROPES, "final_logit_softcapping": 2.0, "attention_bias": True,
            "tie_word_embeddings": False, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "old layout": {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3, "rms_norm_eps": 0.1,
            "hidden_activation": "silu", "num_key_value_heads": 4, "num_hidden_layers": 4,
        },
        "windows alone": {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2},
    },
    classes={
        "CAUSAL_LM": transformers.Gemma3ForCausalLM,
        "SEQ_CLS": transformers.Gemma3TextForSequenceClassification,
        "FEATURE_EXTRACTION": transformers.Gemma3TextModel,
    },
    rates={"attention_dropout": "CAUSAL_LM"},
    perturbed={
        name: value for name, value in GEMMA2.perturbed.items()
        if value[1] != "TOKEN_CLS" and name != "attn_logit_softcapping"
    } | {
        "final_logit_softcapping": (3.0, "CAUSAL_LM"), "rope_local_base_freq": (30.0, "CAUSAL_LM"),
        "sliding_window_pattern": (3, "CAUSAL_LM"),
        "model_type": ("gemma2", "CAUSAL_LM", {"sliding_window_pattern": None, "rope_local_base_freq": 1e4}),
    },
    causal=True,
    silent=(
        "initializer_range", "attn_logit_softcapping", "classifier_dropout", "token_classification_bias", "hf",
    ),
)  # fmt: skip

_FACTORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 11.0]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 70.0, **_FACTORS}
_SCALED = {"rope_scaling": (("rope_type", "longrope"), *((name, tuple(found)) for name, found in _FACTORS.items()))}
PHI3 = Subject(
    config={
        "model_type": "phi3", "vocab_size": 53, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "original_max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "base": {},
        "long": {
            "rope_parameters": _LONGROPE, "original_max_position_embeddings": 8, "sliding_window": 4,
            "num_key_value_heads": 4, "hidden_act": "relu", "embd_pdrop": 0.5,
        },
        "short": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
        "factors": {
            "rope_parameters": _LONGROPE | {"factor": 3.0, "attention_factor": 1.3}, "num_key_value_heads": 1,
            "max_position_embeddings": 32, "original_max_position_embeddings": 12, "rms_norm_eps": 0.1,
        },
        "part of a head": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.5},
            "sliding_window": 5, "num_hidden_layers": 3,
        },
    },
    classes={
        "CAUSAL_LM": transformers.Phi3ForCausalLM,
        "SEQ_CLS": transformers.Phi3ForSequenceClassification,
        "TOKEN_CLS": transformers.Phi3ForTokenClassification,
        "FEATURE_EXTRACTION": transformers.Phi3Model,
    },
    rates={"attention_dropout": "CAUSAL_LM", "resid_pdrop": "CAUSAL_LM"},
    perturbed=_DECODER | {
        "hidden_size": (40, "CAUSAL_LM"), "hidden_act": ("relu", "CAUSAL_LM"), "resid_pdrop": (0.3, "CAUSAL_LM"),
        "num_hidden_layers": (3, "CAUSAL_LM"), "tie_word_embeddings": (True, "CAUSAL_LM"),
        "partial_rotary_factor": (0.5, "CAUSAL_LM"), "rope_scaling": (_SCALED["rope_scaling"], "CAUSAL_LM"),
        "max_position_embeddings": (99, "CAUSAL_LM", _SCALED | {"original_max_position_embeddings": 32}),
        "original_max_position_embeddings": (32, "CAUSAL_LM", _SCALED),
        "classifier_dropout": (0.4, "TOKEN_CLS"), "token_classification_bias": (False, "TOKEN_CLS"),
    },
    causal=True,
)  # fmt: skip

MIXTRAL = Subject(
    config={
        "model_type": "mixtral", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "num_local_experts": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "base": {},
        "one expert each": {
            "num_experts_per_tok": 1, "num_local_experts": 3, "sliding_window": 4, "tie_word_embeddings": True,
            "num_key_value_heads": 4, "router_aux_loss_coef": 0.02,
        },
        "three experts each": {
            "num_experts_per_tok": 3, "hidden_act": "gelu", "head_dim": 10, "rms_norm_eps": 0.1,
            "num_hidden_layers": 3, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
        },
        "all experts": {"num_experts_per_tok": 2, "num_local_experts": 2, "num_key_value_heads": 1},
    },
    classes={
        "CAUSAL_LM": transformers.MixtralForCausalLM,
        "SEQ_CLS": transformers.MixtralForSequenceClassification,
        "TOKEN_CLS": transformers.MixtralForTokenClassification,
        "QUESTION_ANS": transformers.MixtralForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.MixtralModel,
    },
    rates={"attention_dropout": "CAUSAL_LM", "router_jitter_noise": "CAUSAL_LM"},
    perturbed=_DECODER | {
        "hidden_act": ("relu", "CAUSAL_LM"), "num_local_experts": (4, "CAUSAL_LM"),
        "num_experts_per_tok": (1, "CAUSAL_LM"), "router_jitter_noise": (0.1, "CAUSAL_LM"),
        "max_position_embeddings": (7, "CAUSAL_LM", _DYNAMIC), "tie_word_embeddings": (True, "CAUSAL_LM"),
        "num_hidden_layers": (3, "CAUSAL_LM"), "classifier_dropout": (0.4, "TOKEN_CLS"),
        "token_classification_bias": (False, "TOKEN_CLS"),
    },
    causal=True,
    smooth={"num_experts_per_tok": 5},
    converted=True,
)  # fmt: skip

SUBJECTS = {"distilbert": DISTILBERT, "gpt2": GPT2, "t5": T5, "roberta": ROBERTA, "xlm-roberta": XLM_ROBERTA}
SUBJECTS |= {"deberta-v2": DEBERTA, "mixtral": MIXTRAL, "gemma2": GEMMA2, "gemma3_text": GEMMA3, "phi3": PHI3}
SUBJECTS |= sense_subjects.SUBJECTS
