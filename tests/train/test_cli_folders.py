# SPDX-License-Identifier: Apache-2.0
"""`jpeft export` and `jpeft inspect` on folders: what they say, what they refuse, and the exit code with it."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import jpeft
from jpeft.io.card import Card
from jpeft.train import cli, saved

KEY = jax.random.key(0)


def jpeft_(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def adapter(base, folder, method, task="SEQ_CLS"):
    """A folder as a run leaves it."""
    model = jpeft.adapt(jpeft.models.load(base, task), method, key=KEY)
    names = ("bad", "good") if task == "SEQ_CLS" else None
    saved.save_adapter(model, folder, base, saved.Info(names, 32), Card())
    return folder


@pytest.fixture(scope="module")
def lora(bert, tmp_path_factory):
    return adapter(bert, tmp_path_factory.mktemp("adapters") / "lora", jpeft.LoRA(rank=3, targets=["query", "value"]))


def damaged(folder, file, change):
    """Changes the tensors of a file in place."""
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})


def test_export_to_the_other_library_and_back(capsys, bert, lora, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    code, out, err = jpeft_(capsys, "export", "--adapter", lora, "--format", "adapters", "--out", there)
    assert code == 0, err
    assert "AdapterHub adapter" in out
    assert json.loads((there / "head_config.json").read_text())["model_class"] == "BertForSequenceClassification"
    code, _, err = jpeft_(capsys, "export", "--adapter", there, "--out", back)
    assert (code, "names no base; name it by --model" in err) == (2, True)
    code, _, err = jpeft_(capsys, "export", "--adapter", there, "--model", bert, "--out", back)
    assert code == 0, err
    ours, again = (safetensors.numpy.load_file(folder / "adapter_model.safetensors") for folder in (lora, back))
    assert ours.keys() == again.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, again[key])


def test_check_says_and_writes_nothing(capsys, lora, tmp_path):
    code, out, _ = jpeft_(capsys, "export", "--adapter", lora, "--check", "peft")
    assert (code, out) == (0, "peft: holds it\n")
    code, out, _ = jpeft_(capsys, "export", "--adapter", lora, "--check", "vllm", "--out", tmp_path / "x")
    assert code == 1
    assert "refused: the head of a SEQ_CLS model goes along (modules_to_save), which vLLM refuses" in out
    assert not (tmp_path / "x").exists()


def test_what_would_be_lost_is_written_when_asked_for(capsys, llama, tmp_path, monkeypatch):
    """A network has no place in PEFT's files, so the loss shows where the adapter still has one."""
    opened = saved.open_model(llama, None)
    method = jpeft.PrefixTuning(num_tokens=2, projection=True, shift_positions=True)
    model = jpeft.adapt(opened.model, method, key=KEY)
    monkeypatch.setattr(saved, "open_model", lambda *folders: saved.Opened(model, opened.info, llama, str(llama)))
    arguments = "export", "--adapter", "x", "--out", tmp_path / "out"
    code, _, err = jpeft_(capsys, *arguments)
    assert code == 2
    assert "peft would lose the network behind the virtual tokens" in err
    assert "Pass --lossy" in err
    assert jpeft_(capsys, *arguments, "--check", "peft")[0] == 1
    assert not (tmp_path / "out").exists()
    code, _, err = jpeft_(capsys, *arguments, "--lossy", "--check", "peft")
    assert code == 0, err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_export_as_a_merged_model(capsys, lora, tmp_path):
    code, out, err = jpeft_(capsys, "export", "--adapter", lora, "--format", "merged", "--out", tmp_path / "merged")
    assert code == 0, err
    assert "merged model" in out
    code, out, _ = jpeft_(capsys, "inspect", tmp_path / "merged")
    assert code == 0, out
    assert out.startswith("model\n  model_type: bert\n  architectures: ['BertForSequenceClassification']\n")


def test_inspect_tells_what_an_adapter_is(capsys, lora):
    code, out, _ = jpeft_(capsys, "inspect", lora)
    assert code == 0, out
    for text in ("PEFT adapter", "peft_type: LORA", "r: 3", "modules: 4", "F32", "bert for SEQ_CLS", "no fault found"):
        assert text in out
    assert "LoRA(rank=3" in out


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "lora_B.weight is missing"),
        (lambda t: t.update({k: v[:2] for k, v in t.items() if "0.attention.self.query.lora_A" in k}),
         "is [2, 32], and r asks for 3 at axis 0"),
        (lambda t: t.update({k: v * np.inf for k, v in t.items() if "1.attention.self.value.lora_A" in k}),
         "not finite"),
        (lambda t: t.update({"base_model.model.bert.pooler.dense.lora_A.weight": np.ones((3, 32), np.float32)}),
         "target_modules does not mean it"),
    ],
)  # fmt: skip
def test_inspect_finds_what_is_wrong_with_tensors(capsys, bert, tmp_path, change, said):
    folder = adapter(bert, tmp_path / "a", jpeft.LoRA(rank=3, targets=["query", "value"]))
    damaged(folder, "adapter_model.safetensors", change)
    code, out, _ = jpeft_(capsys, "inspect", folder)
    assert code == 1
    assert said in out


def test_inspect_finds_a_file_that_is_cut_short_or_is_not_there(capsys, bert, lora, tmp_path):
    (tmp_path / "a").mkdir()
    for file in lora.iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    code, out, _ = jpeft_(capsys, "inspect", tmp_path / "a")
    assert (code, "copy it again" in out) == (1, True)
    weights.unlink()
    code, out, _ = jpeft_(capsys, "inspect", tmp_path / "a")
    assert (code, f"fault: no {weights}" in out) == (1, True)
    code, _, err = jpeft_(capsys, "inspect", tmp_path / "nothing")
    assert (code, "it is no adapter, no model and no run" in err) == (2, True)
    code, _, err = jpeft_(capsys, "inspect", bert, "--adapter", lora)
    assert (code, "name one folder to inspect" in err) == (2, True)


def test_inspect_a_run(capsys, lora, tmp_path):
    for name, text in (("metrics.jsonl", '{"loss": 1.0}\n{"loss": \n'), ("run.json", '{"updates": 3}')):
        (tmp_path / name).write_text(text)
    (tmp_path / "adapter").mkdir()
    for file in lora.iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    code, out, _ = jpeft_(capsys, "inspect", tmp_path)
    assert code == 1
    assert "jpeft run" in out
    assert "updates: 3" in out
    faults = [line.strip() for line in out.splitlines() if line.startswith("  fault")]
    assert faults == ["fault: config.yaml is missing", "fault: metrics.jsonl has lines that are no JSON: 2"]
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    code, out, _ = jpeft_(capsys, "inspect", tmp_path)
    assert code == 0, out


def test_inspect_a_model_with_a_tensor_of_another_shape(capsys, bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert jpeft_(capsys, "inspect", tmp_path)[0] == 0
    damaged(tmp_path, "model.safetensors", lambda t: t.update({"pooler.dense.bias": np.ones(3, np.float32)}))
    code, out, _ = jpeft_(capsys, "inspect", tmp_path)
    assert (code, "pooler.dense.bias" in out) == (1, True)


def test_export_wants_to_know_what_to_do(capsys, lora):
    code, _, err = jpeft_(capsys, "export", "--adapter", lora)
    assert (code, "name the folder to write by --out, or a target to check for by --check" in err) == (2, True)


def test_a_base_without_a_tokenizer_is_exported_merged_and_inspected(capsys, tmp_path, caplog):
    """What `models.save` writes has none; only what reads texts needs one."""
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "max_position_embeddings": 24}
    config = {"model_type": "bert", "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = jpeft.models.build(config, "SEQ_CLS", num_labels=2, key=KEY)
    jpeft.models.save(model, base)
    jpeft.export_peft(jpeft.adapt(model, jpeft.LoRA(rank=2), key=KEY), adapter, base=str(base))
    for command in (
        ("inspect", adapter, "--model", base),
        ("export", "--adapter", adapter, "--check", "peft"),
        ("export", "--adapter", adapter, "--out", tmp_path / "again"),
        ("export", "--adapter", adapter, "--format", "adapters", "--lossy", "--out", tmp_path / "hub"),
        ("merge", "--adapter", adapter, "--out", tmp_path / "merged"),
    ):
        code, out, err = jpeft_(capsys, *command)
        assert code == 0, (command, out, err)
    assert jpeft.models.load(tmp_path / "merged").task == "SEQ_CLS"
    assert f"{base} has no tokenizer, so {tmp_path / 'again'} gets none" in caplog.text
    code, _, err = jpeft_(capsys, "predict", "--adapter", adapter, "a text")
    assert code == 2
    assert "tokenizer" in err
