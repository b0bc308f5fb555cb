# SPDX-License-Identifier: Apache-2.0
"""What a run shows and keeps: figures, samples, pictures, traces, loggers, the best adapter, an early end."""

import importlib
import io
import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jpeft
from jpeft.train import config, loggers, loop, saved
from jpeft.train.clock import Clock
from jpeft.train.progress import Bar
from jpeft.train.standing import Standing
from jpeft.train.utilization import matmul_weights
from jpeft.train.writer import Writer


def run(tree, *overrides):
    return loop.train(config.parse(config.overridden(tree, overrides)))


def lines(result):
    return [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]


class Recorder(types.ModuleType):
    """Stands in for all three packages, and writes down what it is told."""

    def __init__(self):
        super().__init__("recorder")
        self.told = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments, **options):
            self.told.append((name, arguments, options))
            return self

        return called

    def flushed(self, name):
        return [(arguments, options) for what, arguments, options in self.told if what == name]


@pytest.fixture
def recorder(monkeypatch):
    """Imported under the name of every logger's package."""
    module = Recorder()
    module.id, module.experiment_id, module.info = "w1", "7", types.SimpleNamespace(run_id="r1")
    module.__spec__ = importlib.machinery.ModuleSpec("recorder", None)
    for package in loggers.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, module)
    return module


def test_a_run_shows_and_keeps_what_it_is_asked_to(generate, recorder, capsys):
    """One training with all of it on."""
    result = run(
        generate, "train.epochs=2", "train.best=loss", "train.samples=2", "train.sample_tokens=5", "logging.profile=2",
        "logging.to=[tensorboard, wandb, mlflow]", "logging.project=films", "data.num_widths=1",
    )  # fmt: skip
    out, said, logged = result.adapter.parent, capsys.readouterr().out, lines(result)
    # figures
    updates = [line for line in logged if "losses" in line]
    evaluations = [line for line in logged if "eval_loss" in line]
    for line in updates:
        assert line["tokens_per_s"] <= line["padded_tokens_per_s"]
        assert 0 <= line["data_wait"] <= 1
        assert line["mfu"] > 0
        assert line["peak_memory_mb"] > 50
    assert re.search(r"time: [\d.]+ s: updates [\d.]+ %, compile [\d.]+ %", said)
    # the best
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert result.standing == Standing(
        best["eval_loss"], best["update"], len(evaluations) - 1 - evaluations.index(best)
    )
    assert (out / "best/adapter_model.safetensors").read_bytes() == (
        result.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert f"the best loss, {best['eval_loss']:.4f}, was that of update {best['update']}" in said
    # samples: what the saved adapter writes
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["update"] for sample in samples] == [u for line in evaluations for u in [line["update"]] * 2]
    opened = saved.open_model(None, result.adapter)
    first = json.loads(Path(generate["data"]["eval"]).read_text().splitlines()[0])
    ids = opened.tokenizer.encode([first["text"]])[0]
    ids = ids[: max(1, (len(ids) + 1) // 4)]  # with the end of the text
    of_best = next(sample for sample in samples if sample["update"] == best["update"])
    writer = Writer(opened.model, opened.tokenizer, (3,))
    assert of_best["prompt"] == opened.tokenizer.decode(ids)
    assert of_best["text"] == "".join(piece for ((piece,),) in writer.stream([ids], max_new_tokens=5))
    # pictures and trace
    assert sorted(file.name for file in (out / "plots").iterdir()) == [
        "evaluation.png", "learning_rate.png", "loss.png", "throughput.png",
    ]  # fmt: skip
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert "trace of 2 updates" in said
    # loggers: every number of every line, under the same name and step
    expected = {(line["update"], name): value for line in logged for name, value in loggers.figures(line).items()}
    assert {(3, "train/loss"), (best["update"], "eval/perplexity")} <= expected.keys()
    board = {(update, name): value for (name, value, update), _ in recorder.flushed("add_scalar")}
    bees = {(o["step"], name): value for (values,), o in recorder.flushed("log") for name, value in values.items()}
    flow = {(o["step"], name): value for (_, name, value), o in recorder.flushed("log_metric")}
    assert board == bees == flow == expected
    ((), begun), = recorder.flushed("init")  # fmt: skip
    assert (begun["project"], begun["name"]) == ("films", "run")
    assert begun["config"]["optimizer"]["lr"] == 2e-2
    assert (("films",), {}) in recorder.flushed("set_experiment")
    assert (("r1", "optimizer.lr", "0.02"), {}) in recorder.flushed("log_param")
    assert len(recorder.flushed("close")) == len(recorder.flushed("finish")) == 1
    assert recorder.flushed("set_terminated") == [(("r1",), {})]
    assert loggers.kept(out) == {"wandb": "w1", "mlflow": "r1"}


def test_training_ends_early_and_the_best_is_the_adapter(classify, tmp_path):
    """With a rate that ruins what was learnt, the evaluation after the first is worse for good."""
    overrides = ["train.epochs=9", "train.eval_every=5", "train.best=accuracy", "train.patience=2"]
    result = run(classify, *overrides, "optimizer.lr=0.3", "optimizer.schedule=constant")
    evaluations = [line for line in lines(result) if "eval_loss" in line]
    found = [line["eval_accuracy"] for line in evaluations]
    assert len(found) < 18
    assert result.standing.since == 2
    assert max(found) == found[-3] == result.standing.best
    assert f"{found[-3]:.4g}" in (result.adapter / "README.md").read_text()
    kept = jpeft.partition(saved.open_model(None, result.adapter).model)[1]
    assert any(not np.array_equal(kept[path], leaf) for path, leaf in result.state.trainable.items())


def test_what_is_better_is_known_by_name():
    standing = Standing()
    for update, value in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        standing = standing.after("accuracy", value, update)
    assert standing == Standing(0.7, 2, 2)
    for update, value in enumerate([0.9, 0.95, 0.4], 1):
        standing = standing.after("loss", value, update) if update > 1 else Standing().after("loss", value, update)
    assert standing == Standing(0.4, 3, 0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.best=f1"], r"train.best is one of loss, accuracy, macro_f1, the figures of this evaluation, got 'f1'"),
        (["train.best=loss", "data.eval=[]"], "train.best is set, and data.eval names no file"),
        (["train.patience=2"], "train.patience needs train.best"),
        (["train.samples=2"], r"train.samples is for a model that writes \(CAUSAL_LM\), got SEQ_CLS"),
        (["train.objective=dpo"], "train.objective=dpo is for CAUSAL_LM, got SEQ_CLS"),
        (["preference.beta=0.2"], "the section preference is for train.objective=dpo"),
        (["logging.to=[wandb, wandb]"], "logging.to names one twice: wandb, wandb"),
        (
            ["logging.project=x", "logging.to=[tensorboard]"],
            "logging.project and logging.name are for wandb and mlflow",
        ),
        (["logging.profile=-1"], "logging.profile must not be negative, got -1"),
        (["preference.label_smoothing=0.6"], r"preference.label_smoothing must be in \[0, 0.5\), got 0.6"),
        (["preference.loss=ipo", "preference.label_smoothing=0.1"], "is for preference.loss=sigmoid, got ipo"),
    ],
)
def test_what_would_change_nothing_is_refused(classify, overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.parse(config.overridden(classify, overrides))


def test_a_logger_that_is_not_installed_is_an_error_before_training(classify, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(
        config.ConfigError, match=r"logging.to names wandb, which is not installed; pip install 'jpeft\[wandb\]'"
    ):
        run(classify, "logging.to=[wandb]", "data.train=nowhere.jsonl")


class Terminal(io.StringIO):
    def isatty(self):
        return True


ENTRY = {
    "loss": 0.4321, "lr": 5e-4, "tokens_per_s": 12345.6, "padded_tokens_per_s": 15000.2, "mfu": 0.347,
    "peak_memory_mb": 1536.0,
}  # fmt: skip


@pytest.mark.parametrize("columns, last", [(80, "lr 5.0e-04"), (110, "12,346 tokens/s"), (160, "1.5 GiB")])
def test_the_bar_shows_as_much_as_there_is_room_for(columns, last):
    screen = Terminal()
    bar = Bar(400, 0, screen, columns)
    bar.show(100, ENTRY)
    bar._bar.refresh()
    bar.close()
    shown = [text for text in re.split(r"[\r\n]", screen.getvalue()) if "25%" in text]
    assert shown
    assert "100/400" in shown[-1]
    assert "loss 0.4321" in shown[-1]
    assert shown[-1].rstrip().rstrip("]").endswith(last)
    assert len(shown[-1]) <= columns


def test_the_bar_is_quiet_where_nobody_watches():
    file = io.StringIO()
    bar = Bar(4, 0, file, 80)
    bar.show(1, ENTRY)
    bar.close()
    assert file.getvalue() == ""


def test_the_time_is_told_by_what_it_went_into(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 5.0, 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.on("evaluation"):
        pass
    with clock.on("log"):
        pass
    assert clock.apart == 2.0
    assert clock.shares() == pytest.approx(
        {"updates": 0.7, "evaluation": 0.2, "log": 0.1, "compile": 0, "data": 0, "samples": 0, "save": 0}
    )


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 23, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_that_a_token_meets_are_counted_from_the_config(tied):
    def count(changes, task="CAUSAL_LM"):
        hf = {**LLAMA, "tie_word_embeddings": tied, **changes}
        from flax import nnx

        return matmul_weights(nnx.eval_shape(lambda: jpeft.models.build(hf, task, key=jax.random.key(0))), task)

    attention, mlp, head = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32 * 23
    assert count({}) == 2 * (attention + mlp) + head
    experts = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    if not tied:
        assert count(experts) == 2 * (attention + 2 * mlp + 32 * 4) + head
