# SPDX-License-Identifier: Apache-2.0
"""Runs end to end on tiny models: they learn, repeat, stop before a NaN, and what they save is what they were."""

import errno
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft._quantized import QuantizedKernel
from jpeft.train import cli, config, data, devices, evaluate, folder, job, loop, plan, replay, saved, step, watch


def run(tree, *overrides):
    return loop.train(config.parse(config.overridden(tree, overrides)))


def lines(result):
    return [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]


def test_a_classifier_learns_and_says_so(classify):
    result = run(classify, "train.epochs=6")
    assert result.evaluation.metrics["accuracy"] > 0.95  # 0.61 is the larger class
    logged = lines(result)
    losses = [loss for line in logged for loss in line.get("losses", [])]
    assert losses == result.losses
    assert len(losses) == 6 * 10
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    evaluated = [line for line in logged if "eval_loss" in line]
    assert [line["update"] for line in evaluated] == [10, 20, 30, 40, 50, 60]
    assert {name: evaluated[-1][f"eval_{name}"] for name in result.evaluation.metrics} == result.evaluation.metrics


def test_a_language_model_learns(generate):
    result = run(generate, "train.epochs=3")
    metrics = result.evaluation.metrics
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["loss"] < 0.95 * result.losses[0]


def test_the_figures_are_scikit_learns_on_the_saved_adapter(classify, reviews):
    """Loaded anew, in one batch of one width, in the order of the file."""
    from sklearn.metrics import accuracy_score, f1_score

    result = run(classify)
    opened = saved.open_model(None, result.adapter)
    rows = [json.loads(line) for line in (reviews / "eval.jsonl").read_text().splitlines()]
    ids = opened.tokenizer.encode([row["text"] for row in rows])
    width = max(map(len, ids))
    arrays = [
        np.array([row + [0] * (width - len(row)) for row in ids]),
        np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    ]
    chosen = np.argmax(np.asarray(opened.model(*arrays)), axis=-1)
    truth = [("bad", "good").index(row["label"]) for row in rows]
    assert result.evaluation.predicted.tolist() == chosen.tolist()
    assert result.evaluation.metrics["accuracy"] == accuracy_score(truth, chosen)
    assert result.evaluation.metrics["macro_f1"] == f1_score(truth, chosen, average="macro")


def test_predictions_are_the_evaluations(classify, reviews):
    result = run(classify)
    opened = saved.open_model(None, result.adapter)
    texts = [json.loads(line)["text"] for line in (reviews / "eval.jsonl").read_text().splitlines()]
    found = evaluate.predict(opened.model, opened.tokenizer, texts, opened.info.label_names, max_length=128)
    assert [p.label for p in found] == [("bad", "good")[i] for i in result.evaluation.predicted]
    assert [p.text for p in found] == texts
    assert all(0.5 <= p.probability <= 1 for p in found)


def test_ranks_are_allocated_without_a_word(classify):
    """AdaLoRA's share in the updates is in the program's optimizer, and the pruned adapter is what is saved."""
    method = {"kind": "adalora", "init_rank": 4, "target_rank": 2, "targets": ["query", "value"], "total_steps": 10}
    result = run(classify | {"method": method, "optimizer": {"lr": 2e-2}})
    values = {path: leaf for path, leaf in result.state.trainable.items() if path.endswith("/E")}
    assert sum(int((value != 0).sum()) for value in values.values()) == 2 * 4  # of two layers
    loaded = jpeft.partition(saved.open_model(None, result.adapter).model)[1]
    for path, value in values.items():
        np.testing.assert_array_equal(loaded[path], value)
    with pytest.raises(config.ConfigError, match="total_steps is 11, and this run makes 10 updates"):
        run(classify | {"method": {**method, "total_steps": 11}, "out": f"{result.adapter}_of_another_plan"})


def adapter_bytes(result):
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def test_the_same_seed_is_the_same_run(classify, tmp_path):
    one, same, other = (
        run(classify, f"out={tmp_path / name}", f"train.seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one.losses == same.losses
    assert adapter_bytes(one) == adapter_bytes(same)
    assert one.losses != other.losses


def test_a_run_goes_on_from_a_state_as_if_it_had_not_been_stopped(classify, tmp_path):
    overrides = ["optimizer.schedule=constant", "train.epochs=null"]
    whole = run(classify, *overrides, "train.max_steps=13", f"out={tmp_path / 'whole'}")
    half = run(classify, *overrides, "train.max_steps=6", f"out={tmp_path / 'half'}")
    settings = config.parse(config.overridden(classify, [*overrides, "train.max_steps=13", f"out={tmp_path / 'rest'}"]))
    dataset = job.read_data(settings)
    parts = job.build(settings, dataset.label_names, None)
    target = folder.RunFolder(settings.out)
    target.begin(settings, dataset, parts)
    rest = loop.Loop(settings, dataset, parts, None, target).run(half.state)
    assert half.losses + rest.losses == whole.losses
    assert adapter_bytes(rest) == adapter_bytes(whole)


def test_dropout_can_be_left_out(classify, tmp_path):
    off = [run(classify, f"out={tmp_path / name}", "train.dropout=false") for name in "ab"]
    on = run(classify, f"out={tmp_path / 'on'}")
    assert off[0].losses == off[1].losses
    assert off[0].losses != on.losses


def test_accumulation_makes_fewer_larger_updates(classify, tmp_path):
    overrides = ["train.dropout=false", "train.epochs=null", "train.max_steps=4", "data.num_widths=1"]
    many = run(classify, *overrides, "train.batch_size=4", "train.accumulation=4", f"out={tmp_path / 'a'}")
    one = run(classify, *overrides, "train.batch_size=16", f"out={tmp_path / 'b'}")
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


def test_a_run_stops_before_the_update_that_is_not_finite(classify, tmp_path, monkeypatch, capsys):
    """A NaN in the middle of a run, with the log line many updates later."""
    whole = run(classify, "train.epochs=null", "train.max_steps=4", "optimizer.schedule=constant")
    count, fifth = iter(range(1000)), []

    def poisoned(batches, batch, *own):
        arrays = collate(batches, batch, *own)
        if next(count) == 4:  # the fifth update's, whenever it is made
            fifth.append(batch.rows.tobytes())
        if batch.rows.tobytes() in fifth:
            arrays["input_ids"][0, 0, 0] = 10_000  # a token that the model does not have: NaN
        return arrays

    collate = data.Batches.collate
    monkeypatch.setattr(data.Batches, "collate", poisoned)
    overrides = ["train.epochs=1", "optimizer.schedule=constant", "train.log_every=9", f"out={tmp_path / 'a bad run'}"]
    with pytest.raises(
        loop.TrainingStopped, match=r"update 5: loss nan, gradient norm nan. The update was not made"
    ) as end:
        run(classify, *overrides)
    failure = tmp_path / "a bad run" / "failure"
    state, batch = np.load(failure / "state.npz"), np.load(failure / "batch.npz")
    assert int(state[".updates"]) == 4
    for path, value in whole.state.trainable.items():
        np.testing.assert_array_equal(state[f".trainable['{path}']"], value)
    assert batch["input_ids"].shape[:2] == (1, 16)
    again = replay.replay(failure)
    assert not np.isfinite(again.loss)
    assert int(again.labels) == 16
    (command,) = re.findall("`(.*)`", str(end.value))
    program, *arguments = shlex.split(command)
    assert program == "jpeft"
    capsys.readouterr()
    cli.main(arguments)
    assert json.loads(capsys.readouterr().out)["labels"] == 16
    assert not (tmp_path / "a bad run" / "adapter").exists()


def test_updates_that_are_not_finite_can_be_skipped_up_to_a_number():
    def sums(trainable, batch, key):
        return (trainable["x"] * batch["labels"]).sum(), jnp.float32(1)

    tx = optax.adam(0.1)
    good, bad = ({"labels": jnp.full((1, 2), value)} for value in (1.0, jnp.nan))
    state, states = step.begin(tx, {"x": jnp.ones(2)}), []
    for batch in (good, bad, good, bad, bad, good):
        state, metrics = step.advance(sums, tx, state, batch, None, lambda _: None, max_skips=2)
        assert np.isfinite(metrics.loss) == np.isfinite(batch["labels"]).all()
        states.append(state)
    assert [int(s.updates) for s in states] == [1, 2, 3, 4, 4, 4]
    assert [int(s.skipped) for s in states] == [0, 1, 1, 2, 2, 2]
    assert [bool(s.failed) for s in states] == [False] * 4 + [True] * 2
    plain = step.begin(tx, {"x": jnp.ones(2)})
    for _ in range(2):
        plain, _ = step.advance(sums, tx, plain, good, None, lambda _: None)
    for one, other in zip(jax.tree.leaves(plain[:2]), jax.tree.leaves(state[:2]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_folder_holds_what_is_needed_to_repeat_it(classify, reviews):
    result = run(classify)
    out = result.adapter.parent
    assert config.load(out / "config.yaml") == config.parse(classify)
    record = json.loads((out / "run.json").read_text())
    import hashlib

    assert record["data_sha256"] == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (reviews / "train.jsonl", reviews / "eval.jsonl")
    }
    assert record["versions"]["jax"] == jax.__version__
    assert record["label_names"] == ["bad", "good"]
    card = (result.adapter / "README.md").read_text()
    assert "train.jsonl" in card
    assert f"{result.evaluation.metrics['accuracy']:.4g}" in card


def test_a_disk_without_room_says_what_the_adapter_needs_and_leaves_the_old_one(tmp_path):
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "old").touch()

    def fill():
        with folder.replaced(place, 12345) as fresh:
            fresh.mkdir()
            (fresh / "half").touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match=r"adapter was not written: it needs about 12,345 bytes, [\d,]+ are free .*remains"
    ):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert [path.name for path in place.iterdir()] == ["old"]


def test_plots_that_cannot_be_drawn_leave_the_adapter(classify, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(watch, "curves", full)
    result = run(classify, "train.epochs=null", "train.max_steps=1", "data.eval=[]")
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert "plots could not be drawn: [Errno 28] No space left" in capsys.readouterr().out


def test_what_is_for_conversations_is_refused_of_other_rows(generate):
    for option in ("template=plain", "loss_on=all"):
        settings = config.parse(config.overridden(generate, [f"data.{option}"]))
        with pytest.raises(
            data.DataError, match=rf"data\.{option.partition('=')[0]} is for conversations, .* form text"
        ):
            job.read_data(settings)


def test_a_run_is_not_overwritten(classify):
    run(classify)
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(classify)
    folder.remove_run(classify["out"])
    run(classify)


def test_only_a_run_is_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds something that is no run"):
        folder.remove_run(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_what_a_model_cannot_do_is_said_before_anything_is_read(classify):
    with pytest.raises(config.ConfigError, match=r"unknown key method.rnk"):
        run(classify, "method.rnk=3", "data.train=nowhere.jsonl")


def test_a_target_that_the_model_does_not_have(classify):
    with pytest.raises(ValueError, match="q_proj"):
        run(classify, "method.targets=[q_proj]")


def test_the_number_of_compilations_is_bounded(classify, monkeypatch):
    made = []
    monkeypatch.setattr(loop, "make_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    from jpeft.train.step import make_step as make

    run(classify, "train.epochs=3", "data.num_widths=2")
    assert made[0].num_compiled <= 2


def test_lora_plus_trains_b_faster(classify, tmp_path):
    plain = run(classify, "train.epochs=null", "train.max_steps=1", f"out={tmp_path / 'a'}").state.trainable
    plus = run(
        classify, "train.epochs=null", "train.max_steps=1", "optimizer.lora_plus_ratio=8", f"out={tmp_path / 'b'}"
    ).state.trainable
    (b,) = [path for path in plain if path.endswith("query/adapters/lora/B")]
    np.testing.assert_allclose(plus[b], 8 * plain[b], rtol=1e-5)  # B starts at zero
    (a,) = [path for path in plain if path.endswith("query/adapters/lora/A")]
    np.testing.assert_array_equal(plus[a], plain[a])


def test_bfloat16_keeps_its_adapter_in_float32(classify):
    result = run(classify, "model.dtype=bfloat16")
    assert {value.dtype.name for value in result.state.trainable.values()} == {"float32"}
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize("scheme", ["nf4_double", "int8"])
def test_a_quantized_base_is_used_as_it_was_trained_beside(classify, scheme, tmp_path):
    tree = classify | {"model": classify["model"] | {"quantize": scheme}}
    result = run(tree, "train.epochs=6")
    assert result.evaluation.metrics["accuracy"] > 0.95
    opened = saved.open_model(None, result.adapter)
    layer = opened.model.layers.attention.self.query
    assert isinstance(layer.kernel, QuantizedKernel)
    assert layer.kernel.scheme == scheme
    jax.tree.map(np.testing.assert_array_equal, jpeft.partition(opened.model)[1], result.state.trainable)
    counts = jpeft.summary(opened.model)
    assert f"base: {counts.base:,} parameters, {counts.base_bytes:,} bytes" in plan.dry_run(config.parse(tree))
    assert saved.save_merged(opened, tmp_path / "merged").logit < 1e-5
    plain = jpeft.models.load(classify["model"]["path"], "SEQ_CLS", num_labels=2)
    merged = jpeft.models.load(tmp_path / "merged")
    moved = merged.layers.intermediate.dense.kernel[...] - plain.layers.intermediate.dense.kernel[...]
    assert 0 < np.abs(moved).max() < 0.1  # what the adapter was trained beside, not what was there before


def test_a_dry_run_counts_without_weights(classify, tmp_path):
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((type(tmp_path)(classify["model"]["path"]) / name).read_bytes())
    said = plan.dry_run(config.parse(config.overridden(classify, [f"model.path={bare}"])))
    model = jpeft.models.load(classify["model"]["path"], "SEQ_CLS", num_labels=2)
    model = jpeft.adapt(model, config.method(classify["method"]), key=jax.random.key(0))
    assert str(jpeft.summary(model)) in said
    assert "10 updates, 10 an epoch; at most 2 compilations" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_on_a_mesh_has_each_devices_memory(classify):
    """By shape and compiled, the run's own step: the base is split over four devices, and the optimizer's state too."""
    tree = config.overridden(classify, ["train.batch_size=8", "train.ema=0.9"])
    said = {mesh: plan.dry_run(config.parse({**tree, "mesh": mesh})) for mesh in (None, "data=2,fsdp=2,sequence=2")}
    assert "memory depends on the mesh" not in "".join(said.values())
    assert "collectives" in said["data=2,fsdp=2,sequence=2"]
    assert "at the peak rate of 8 x cpu" in said["data=2,fsdp=2,sequence=2"]
    for text in said.values():
        total = next(line for line in text.splitlines() if line.startswith("total "))
        assert re.fullmatch(r"total +[\d.]+ [GM]iB +[\d.]+ [GM]iB   \([+-][\d.]+ %\)", total)


@pytest.mark.parametrize("spec", ["host:1", "host,2,0", "host:1,two,0"])
def test_processes_that_are_named_wrongly(spec):
    with pytest.raises(ValueError, match="--distributed takes 'host:port,num_processes,process_id' or 'auto'"):
        devices.together(spec).__enter__()
