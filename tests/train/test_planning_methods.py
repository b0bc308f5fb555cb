# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan` on a CPU: memory by shape beside the compiled step's, of two models, four methods and every policy."""

import itertools
import json

import pytest

from jpeft.train.cli import main
from jpeft.train.planning import compiling, devices
from jpeft.train.planning.estimate import memory
from jpeft.train.planning.request import Request
from jpeft.train.planning.subject import subject

#: Total by shape against the compiled step's, relative: what is guessed of a compiler's own working memory.
CLOSE = 0.10
#: The same on a CPU that computes in float32 what is in bfloat16, and keeps some of it in both.
CLOSE_WIDENED = 0.15

WIDTHS = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SMALL = {"vocab_size": 2048, "d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 6, "num_heads": 8}
#: Families whose configurations have other names for the same sizes, and other tasks.
OTHERS = {
    "gpt2": ("CAUSAL_LM", {"vocab_size": 2048, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 512}),
    "distilbert": ("SEQ_CLS", {"vocab_size": 2048, "dim": 256, "n_layers": 6, "n_heads": 8, "hidden_dim": 1024}),
    "t5": ("SEQ_2_SEQ_LM", SMALL),
    "bert": ("QUESTION_ANS", WIDTHS | {"intermediate_size": 1024}),
    "roberta": ("TOKEN_CLS", WIDTHS | {"intermediate_size": 1024}),
}
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype, close", [("float32", CLOSE), ("bfloat16", CLOSE_WIDENED)])
@pytest.mark.parametrize("kind", OTHERS)
def test_memory_of_every_family_is_the_compiled_programs(kind, dtype, close, tmp_path, optimised):
    """On a CPU bfloat16 is computed in float32, beside a copy of the base."""
    task, config = OTHERS[kind]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": kind, **config}))
    sizes = {"batch": 8, "seq": 256, "target_seq": 96 if kind == "t5" else None}
    for how in (LORA, {"kind": "houlsby"}):
        asked = Request(str(file), how, devices.machine("cpu", 1), task=task, dtype=dtype, **sizes)
        found, program = memory(subject(asked)), compiling.compiled(asked, read=False)
        assert abs(found.total / program.total - 1) < close, (how, found, program)


def test_a_task_that_no_batch_is_known_of_is_refused():
    machine = devices.machine("cpu", 1)
    with pytest.raises(ValueError, match=r"a plan knows the tasks CAUSAL_LM, SEQ_CLS, .*; got 'MULTIPLE_CHOICE'"):
        Request("gpt2", LORA, machine, task="MULTIPLE_CHOICE")
    for wrong in ({"target_seq": 8}, {"target_seq": 0, "task": "SEQ_2_SEQ_LM"}):
        with pytest.raises(ValueError, match="target_seq is 1 or more, and of SEQ_2_SEQ_LM; got"):
            Request("t5-base", LORA, machine, **wrong)


def test_weights_that_a_mesh_does_not_divide_are_refused_or_whole(capsys):
    """BERT's 30,522 words over four devices along `tensor`."""
    asked = ["plan", "--model", "bert-base-uncased", "--task", "SEQ_CLS", "--devices", "4", "--mesh", "tensor=4"]
    asked += ["--device", "h100", "--no-compile", "--json"]
    with pytest.raises(SystemExit):
        main(asked)
    said = "does not divide embeddings/word_embeddings/embedding axis 0 of 30522 over tensor: take sizes that do"
    assert said in capsys.readouterr().err
    main([*asked, "--uneven", "whole"])
    assert json.loads(capsys.readouterr().out)["by_shape"]["weights"] > 30522 * 768 * 2
    with pytest.raises(SystemExit):
        main(["plan", "--model", "bert-base-uncased", "--uneven", "whole"])
    assert "--uneven whole is of a mesh, and the machine is one device" in capsys.readouterr().err
