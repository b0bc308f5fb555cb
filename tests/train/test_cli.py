# SPDX-License-Identifier: Apache-2.0
"""The command line as a user sees it: what it prints, writes, and says where something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import jpeft
from jpeft.train import cli, loop, tokenizer


def jpeft_(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def written(classify, tmp_path):
    """The configuration as a file."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(classify))
    return file


@pytest.fixture(scope="module")
def trained(bert, reviews, tmp_path_factory):
    """Folder of a run."""
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "model": {"path": str(bert), "task": "SEQ_CLS"},
        "data": {"train": str(reviews / "train.jsonl"), "eval": str(reviews / "eval.jsonl"), "num_widths": 1},
        "method": {"kind": "lora", "targets": ["query", "value", "word_embeddings"]},
        "optimizer": {"lr": 2e-2},
        "train": {"epochs": 4, "batch_size": 16},
        "out": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    cli.main(["train", str(folder / "run.yaml")])
    return folder / "run"


def test_nothing_heavy_is_imported_before_a_command_runs():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, jpeft.train.cli; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"jax", "numpy", "flax", "yaml", "pydantic", "torch", "tqdm"} & set(loaded.stdout.split())


@pytest.mark.parametrize("command", ["", "train", "eval", "predict", "merge", "export", "inspect", "demo"])
def test_every_command_has_help(capsys, command):
    code, out, _ = jpeft_(capsys, *filter(None, [command]), "--help")
    assert code == 0
    assert "usage: jpeft" in out


def test_train_with_overrides_of_every_spelling(capsys, written, tmp_path):
    out = tmp_path / "other: größer #1"
    given = (
        "train", written, "optimizer.lr=1e-3", "--optimizer.clip", "0.5", "--out", out,
        "--data.num_widths=1", "train.epochs=null", "train.max_steps=2",
    )  # fmt: skip
    code, _, err = jpeft_(capsys, *given, "--seed", 3)
    assert code == 0, err
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["optimizer"]["lr"] == 1e-3
    assert settings["optimizer"]["clip"] == 0.5
    assert settings["train"]["seed"] == 3
    assert settings["data"]["num_widths"] == 1
    code, said, _ = jpeft_(capsys, *given, "--seed", 3, "--resume")
    assert (code, f"this run is finished: {out}" in said) == (0, True)
    code, _, err = jpeft_(capsys, *given, "--seed", 4, "--resume")
    assert code == 2
    assert "a finished run, which is another one:\n  train.seed: 3 in the finished run, 4 now\n" in err


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "error: there is not enough memory. Smaller batches"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "memory: RESOURCE_EXHAUSTED: .* 9 bytes. Sm",
        ),
    ],
)
def test_too_little_memory_is_one_line(capsys, written, monkeypatch, error, said):
    monkeypatch.setattr(loop, "train", lambda *_, **__: (_ for _ in ()).throw(error))
    code, _, err = jpeft_(capsys, "train", written)
    assert code == 2
    assert re.search(said, err)
    assert len(err.strip().splitlines()) == 1


def test_a_fault_of_the_programs_own_keeps_its_stack(written, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no one knows")))
    with pytest.raises(RuntimeError, match="no one knows"):
        cli.main(["train", str(written)])


def test_dry_run_writes_nothing(capsys, written, classify):
    code, out, _ = jpeft_(capsys, "train", written, "--dry-run")
    assert code == 0
    assert "150 rows" in out
    assert "10 updates, 10 an epoch" in out
    assert not os.path.exists(classify["out"])


def test_overwrite(capsys, written):
    for arguments, expected in (((), 0), ((), 2), (("--overwrite",), 0)):
        code, _, err = jpeft_(capsys, "train", written, "train.epochs=null", "train.max_steps=1", *arguments)
        assert code == expected, err


def test_predict_says_what_the_evaluation_said(capsys, trained, reviews):
    rows = [json.loads(line) for line in (reviews / "eval.jsonl").read_text().splitlines()]
    code, out, _ = jpeft_(capsys, "predict", "--adapter", trained / "adapter", *[row["text"] for row in rows])
    assert code == 0
    labels = [line.split("\t")[0] for line in out.splitlines()]
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert np.mean([label == row["label"] for label, row in zip(labels, rows, strict=True)]) == pytest.approx(
        last["eval_accuracy"]
    )
    assert last["eval_accuracy"] > 0.9


def test_predict_reads_lines(capsys, trained, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("the film was good\nthe plot is poor\n"))
    code, out, _ = jpeft_(capsys, "predict", "--adapter", trained / "adapter")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == ["good", "bad"]


def test_eval_gives_the_runs_figures(capsys, trained, reviews):
    code, out, _ = jpeft_(capsys, "eval", "--adapter", trained / "adapter", "--data", reviews / "eval.jsonl")
    assert code == 0
    got = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[-3:]}
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    for name, value in got.items():
        assert value == pytest.approx(last[f"eval_{name}"], abs=1e-5)


def test_a_merged_model_needs_no_adapter(capsys, trained, tmp_path):
    text = tmp_path / "sample.txt"
    text.write_text("the film was good\n\nthe plot is poor and the plot is poor\n")
    given = ("--adapter", trained / "adapter", "--out", tmp_path / "merged")
    code, out, _ = jpeft_(capsys, "merge", *given, "--text", text)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("by merging a logit moved by at most ")]
    assert re.search(r"KL \S+ nats, same argmax in 2 of 2; on 2 lines of sample.txt, \d+ tokens$", line)
    text.write_text("\n")
    code, _, err = jpeft_(capsys, "merge", *given, "--text", text)
    assert code == 2
    assert "sample.txt holds no text to measure the drift on" in err
    sentences = ["the film was good", "the plot is poor"]
    _, with_adapter, _ = jpeft_(capsys, "predict", "--adapter", trained / "adapter", *sentences)
    code, merged, err = jpeft_(capsys, "predict", "--model", tmp_path / "merged", *sentences)
    assert code == 0, err
    assert merged == with_adapter


def test_transformers_loads_a_merged_model(capsys, trained, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    jpeft_(capsys, "merge", "--adapter", trained / "adapter", "--out", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}
    inputs = AutoTokenizer.from_pretrained(tmp_path / "merged")("the film was good", return_tensors="pt")
    with torch.no_grad():
        assert model.config.id2label[int(model(**inputs).logits.argmax())] == "good"


def test_an_exported_adapter_is_the_saved_one(capsys, trained, tmp_path):
    code, _, err = jpeft_(capsys, "export", "--adapter", trained / "adapter", "--out", tmp_path / "peft")
    assert code == 0, err
    for name in ("adapter_config.json", "adapter_model.safetensors", "jpeft.json", "tokenizer.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (trained / "adapter" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_of_pefts_own_making(capsys, bert, reviews, tmp_path):
    """It names no labels, and its head has three."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "theirs")
    code, out, err = jpeft_(capsys, "predict", "--model", bert, "--adapter", tmp_path / "theirs", "the film was good")
    assert code == 0, err
    with torch.no_grad():
        ids = torch.tensor(tokenizer.load(bert).encode(["the film was good"]))
        p = model.eval()(input_ids=ids).logits.softmax(-1)[0]
    label, probability, _ = out.rstrip("\n").split("\t")
    assert label == f"LABEL_{int(p.argmax())}"
    assert float(probability) == pytest.approx(float(p.max()), abs=1e-4)


def test_inspect_a_model_and_an_adapter(capsys, bert, trained):
    code, out, _ = jpeft_(capsys, "inspect", "--model", bert)
    assert code == 0
    assert "bert for FEATURE_EXTRACTION" in out
    assert "encoder.layer.0.attention.self.query and 1 more" in out
    code, out, _ = jpeft_(capsys, "inspect", "--adapter", trained / "adapter")
    assert code == 0
    assert "trainable" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["train", "RUN", "optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["train", "RUN", "--optimizer.lrr", "1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["train", "RUN", "--sead", "1"], "an override has the form section.key=value, got '--sead'"),
        (["train", "RUN", "model.path=nowhere"], "nowhere is no folder; name a Hugging Face model folder"),
        (["train", "RUN", "data.train=nowhere.jsonl"], "no data file nowhere.jsonl"),
        (["train", "RUN", "data.text=sentence"], "has no column 'sentence'; it has text, label"),
        (["train", "RUN", "method.rank=0"], "rank"),
        (["train", "RUN", "method.targets=[qurey]"], "qurey"),
        (["train", "RUN", "--mesh", "data=3"], "a mesh of data=3"),
        (["train", "RUN", "--mesh", "date=8"], "unknown mesh axis 'date'"),
        (["train", "RUN", "--mesh", "data=8", "train.batch_size=12"], "does not divide"),
        (["train", "RUN", "--distributed", "here"], "--distributed takes"),
        (["predict", "x"], "name a model, an adapter, or both"),
        (["predict", "--model", "BERT", "x"], "has no labels to choose from"),
        (["predict", "--adapter", "nowhere", "x"], "no nowhere/adapter_config.json"),
        (["predict", "--adapter", "TRAINED", "x"], "did you mean"),
        (["predict", "--model", "BERT", "x", "--nonsense"], "does not know --nonsense"),
        (["eval", "--model", "nowhere", "--data", "x.jsonl"], "nowhere"),
        (["merge", "--model", "BERT", "--out", "x"], "name the adapter to merge"),
        (["export", "--model", "BERT", "--out", "x"], "name the adapter to export"),
        (["inspect"], "name a model, an adapter, or both"),
        (["inspect", "--model", "nowhere"], "no nowhere/config.json"),
    ],
)
def test_a_users_error_is_one_line(capsys, written, bert, trained, arguments, said):
    names = {"RUN": written, "BERT": bert, "TRAINED": trained}
    code, _, err = jpeft_(capsys, *[names.get(argument, argument) for argument in arguments])
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("jpeft: error: ")]
    assert said in line
    assert "Traceback" not in err


def test_the_traceback_is_there_when_asked_for(written):
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "nowhere.yaml", "--traceback"])


def test_a_run_that_had_to_stop_says_so_and_exits_with_1(capsys, written):
    code, _, err = jpeft_(capsys, "train", written, "optimizer.lr=1e30", "optimizer.clip=null", "train.epochs=20")
    assert code == 1
    assert "jpeft: stopped: update " in err
    assert "The update was not made" in err


def test_the_public_names_of_the_program():
    assert jpeft.train.step.lm_loss is jpeft.train.losses.lm_loss
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jpeft.train.nothing


def test_overwrite_removes_nothing_before_the_new_run_can_begin(capsys, written, classify):
    short = "train.epochs=null", "train.max_steps=1"
    assert jpeft_(capsys, "train", written, *short)[0] == 0
    before = {file: file.read_bytes() for file in Path(classify["out"]).rglob("*") if file.is_file()}
    for change in ("data.train=absent.jsonl", "model.path=absent", "method.targets=[nothing]"):
        assert jpeft_(capsys, "train", written, *short, "--overwrite", change)[0] == 2
    assert {file: file.read_bytes() for file in Path(classify["out"]).rglob("*") if file.is_file()} == before


def test_two_processes_do_not_train_in_one_folder(capsys, written, classify):
    out = Path(classify["out"])
    out.mkdir(parents=True)
    holding = (
        "import sys; from jpeft.train.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).held():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        for how in ((), ("--resume",), ("--overwrite",)):
            code, _, err = jpeft_(capsys, "train", written, *how)
            assert code == 2
            assert f"another process is training in {out}; wait for its end" in err
        other.kill()  # as is, it holds nothing any longer
    assert jpeft_(capsys, "train", written, "train.epochs=null", "train.max_steps=1")[0] == 0
