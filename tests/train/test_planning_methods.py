# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan` on a CPU: memory by shape beside the compiled step's, of two models, four methods and every policy."""

import itertools
import json

import pytest

from jpeft.train.planning import compiling, devices
from jpeft.train.planning.estimate import memory
from jpeft.train.planning.request import Request
from jpeft.train.planning.subject import subject

#: Total by shape against the compiled step's, relative: what is guessed of a compiler's own working memory.
CLOSE = 0.10

WIDTHS = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
MODELS = {
    "llama": ("CAUSAL_LM", {"intermediate_size": 688, "num_key_value_heads": 4, "max_position_embeddings": 1024}),
    "bert": ("SEQ_CLS", {"intermediate_size": 1024, "max_position_embeddings": 512}),
}
LORA = {"kind": "lora", "rank": 16, "targets": "all-linear"}
METHODS = {
    "lora": (LORA, None),
    "qlora": (LORA, "nf4"),
    "prefix": ({"kind": "prefix_tuning", "num_tokens": 20}, None),
    "full": ({"kind": "full"}, None),
}
POLICIES = ("none", "full", "dots", "names", "offload")
EVERY = list(itertools.product(MODELS, METHODS, POLICIES))


@pytest.mark.slow
@pytest.mark.parametrize("kind, method, remat", EVERY)
def test_memory_of_every_method_and_policy_is_the_compiled_programs(kind, method, remat, tmp_path, optimised):
    task, config = MODELS[kind]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": kind, "tie_word_embeddings": False, **WIDTHS, **config}))
    how, scheme = METHODS[method]
    machine, sizes = devices.machine("cpu", 1), {"batch": 8, "seq": 256, "dtype": "float32"}
    asked = Request(str(file), how, machine, task=task, remat=remat, quantize=scheme, **sizes)
    found, program = memory(subject(asked)), compiling.compiled(asked, read=False)
    assert abs(found.total / program.total - 1) < CLOSE, (found, program)
    assert found.host == 0, "a CPU's memory is the host's"
