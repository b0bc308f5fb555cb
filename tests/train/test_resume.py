# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped and goes on is the run that was not: every loss, every line, every byte of the adapter."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.io import checkpoint
from jpeft.io.checkpoint import steps
from jpeft.models import CheckpointError
from jpeft.train import cli, config, exits, identity, interruption, loop, watch

TIMES = {"seconds", "tokens_per_s", "padded_tokens_per_s", "images_per_s", "padded_images_per_s", "mfu", "data_wait",
         "peak_memory_mb"}  # fmt: skip


def lines(out):
    """The run's figures, without times."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


@pytest.fixture(name="at")
def _at(monkeypatch):
    """`at[n] = action`: done once, right after update n was given to the device."""
    actions, update = {}, watch.Watch.update

    def then(self, *args):
        update(self, *args)
        self.made = getattr(self, "made", self._bar_start) + 1
        actions.pop(self.made, lambda: None)()

    start = watch.Watch.__init__

    def begun(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self._bar_start = args[5]

    monkeypatch.setattr(watch.Watch, "__init__", begun)
    monkeypatch.setattr(watch.Watch, "update", then)
    return actions


class Crash(Exception):
    """The process ends here, as far as the run can tell."""


def crash():
    raise Crash


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("subject", ["classify", "see"])
def test_a_run_that_was_stopped_twice_is_the_run_that_was_not(subject, request, tmp_path, at, capsys):
    """By SIGTERM where an evaluation is due, then by a crash between two checkpoints and two lines."""
    tree = request.getfixturevalue(subject)
    overrides = ["train.max_steps=9", "train.epochs=null", "train.batch_size=8", "train.accumulation=2",
                 "train.eval_every=4", "train.log_every=3", "train.save_every=5", "train.best=loss",
                 *(["data.num_widths=1"] if subject == "classify" else [])]  # fmt: skip
    whole = config.parse(config.overridden(tree, [*overrides, f"out={tmp_path / 'whole'}"]))
    parts = config.parse(config.overridden(tree, [*overrides, f"out={tmp_path / 'parts'}"]))
    loop.train(whole)
    at[4] = terminate
    with pytest.raises(interruption.Interrupted, match="after update 4"):
        loop.train(parts, resume=True)
    assert steps(tmp_path / "parts" / "checkpoints") == [4]
    at[7] = crash
    with pytest.raises(Crash):
        loop.train(parts, resume=True)
    result = loop.train(parts, resume=True)
    assert "resumed after update 5" in capsys.readouterr().out
    assert len(result.losses) == 5  # with that of update 5, which had no line yet
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for name in ("adapter", "best"):
        one, other = (tmp_path / run / name / "adapter_model.safetensors" for run in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert [note["update"] for note in record["resumed"]] == [4, 5]
    with pytest.raises(FileExistsError, match="holds a finished run"):
        loop.train(parts, resume=True)


def test_a_signal_within_a_save_is_heeded_and_the_save_is_whole(classify, tmp_path, monkeypatch):
    """It comes while orbax's thread is between the last file of a step and its name."""
    overrides = ["train.max_steps=9", "train.epochs=null", "train.save_every=2", "train.keep=9", "data.num_widths=1"]
    whole, parts = (
        config.parse(config.overridden(classify, [*overrides, f"out={tmp_path / out}"])) for out in ("whole", "parts")
    )
    loop.train(whole)
    seal, sent = checkpoint.seal, []

    def sealed(step):
        seal(step)
        if not sent:
            sent.append(step)
            terminate()

    monkeypatch.setattr(checkpoint, "seal", sealed)
    with pytest.raises(interruption.Interrupted):
        loop.train(parts, resume=True)
    monkeypatch.undo()
    folder = tmp_path / "parts" / "checkpoints"
    assert sent[0].name.startswith("2.")
    assert steps(folder)[0] == 2
    assert len(steps(folder)) >= 2
    assert [checkpoint.verify(folder / str(step)) for step in steps(folder)] == [[]] * len(steps(folder))
    loop.train(parts, resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(generate, tmp_path, at):
    """One device, then eight, then one again: equal up to the order in which float32 sums are taken."""
    overrides = ["train.max_steps=6", "train.epochs=null", "train.log_every=1", "data.num_widths=1", "data.eval=[]"]
    whole, one, eight = (
        config.parse(config.overridden(generate, [*overrides, f"out={tmp_path / out}", f"mesh={mesh}"]))
        for out, mesh in (("whole", "null"), ("parts", "null"), ("parts", "'data=2,fsdp=2,tensor=2'"))
    )
    loop.train(whole)
    for update, settings in ((2, one), (4, eight)):
        at[update] = terminate
        with pytest.raises(interruption.Interrupted, match=f"after update {update}"):
            loop.train(settings, resume=True)
    loop.train(one, resume=True)
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("whole", "parts")]
    assert len(losses[1]) == 6
    assert losses[0][:2] == losses[1][:2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert [len(note["changed"]) for note in record["resumed"]] == [1, 1]


def test_what_makes_it_another_run_is_refused_by_name(classify, tmp_path, at):
    settings = ["train.max_steps=3", "train.epochs=null", "data.eval=[]"]
    at[2] = terminate
    with pytest.raises(interruption.Interrupted):
        loop.train(config.parse(config.overridden(classify, settings)))
    other = [*settings, "train.seed=7", "train.batch_size=8", "train.log_every=3"]
    with pytest.raises(CheckpointError, match="would be another one") as caught:
        loop.train(config.parse(config.overridden(classify, other)), resume=True)
    assert "train.seed: 0 in the checkpoint, 7 now" in str(caught.value)
    assert "train.batch_size: 16 in the checkpoint, 8 now" in str(caught.value)
    assert "batches an epoch: 10 in the checkpoint, 19 now" in str(caught.value)
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        loop.train(config.parse(config.overridden(classify, settings)))


def test_data_and_template_may_lie_elsewhere_but_must_be_the_same(generate, tmp_path, at, capsys):
    """The other template differs by a space, which makes no other token: only its text tells."""
    talk = {"messages": [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]}
    rows, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    rows.write_text((json.dumps(talk) + "\n") * 40)
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    template.write_text(text)
    settings = ["train.max_steps=3", "train.epochs=null", "data.eval=[]", "data.num_widths=1"]

    def given(rows, template, *more):
        own = [f"data.train={{path: {rows}}}", f"data.template={template}", *more]
        return config.parse(config.overridden(generate, [*settings, *own]))

    at[2] = terminate
    with pytest.raises(interruption.Interrupted):
        loop.train(given(rows, template))
    out = tmp_path / "run"
    assert (out / "chat_template.jinja").read_text() == text
    assert json.loads((out / "run.json").read_text())["template_sha256"]
    template.write_text(text.replace("}} {%", "}}  {%"))
    with pytest.raises(CheckpointError, match=r"another one:\n  template_sha256: \w+ in the checkpoint, \w+ now\nTake"):
        loop.train(given(rows, template), resume=True)
    template.write_text(text)
    moved = rows.rename(tmp_path / "moved.jsonl"), template.rename(tmp_path / "moved.jinja")
    loop.train(given(*moved), resume=True)
    said = capsys.readouterr().out
    assert f"path of data.train: ['{rows}'] in the checkpoint, ['{moved[0]}'] now" in said
    assert f"path of data.template: {template} in the checkpoint, {moved[1]} now" in said
    finished = config.load(out / "config.yaml")
    identity.check_finished(finished, finished)
    for other in (given(*moved), given(rows, template, "train.seed=1")):
        with pytest.raises(CheckpointError, match="a finished run, which is another one"):
            identity.check_finished(finished, other)


def test_the_exit_code_of_an_interrupted_run(monkeypatch, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"{{model: {{path: m, task: CAUSAL_LM}}, data: {{train: t.jsonl}}, train: {{epochs: 1}}, out: {tmp_path}/o}}"
    )

    def interrupted(*_, **__):
        raise interruption.Interrupted("after update 4")

    monkeypatch.setattr(loop, "train", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(file), "--resume"])
    assert ended.value.code == exits.INTERRUPTED == 75
    assert "after update 4" in capsys.readouterr().err


def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = signal.getsignal(signal.SIGTERM)
    with interruption.Interruption() as asked:
        assert not asked.after(1)
        terminate()
        assert asked.after(2)
        assert not codes
        terminate()
        assert codes == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_differences_are_refused_stated_or_free():
    saved = {"train.seed": 0, "mesh": None, "version.jax": "1", "out": "a", "data files": ["x"], "gone": 1}
    assert identity.compare(saved, saved | {"out": "b"}) == []
    assert identity.compare(saved, saved | {"mesh": "data=2", "version.jax": "2"}) == [
        "mesh: None in the checkpoint, data=2 now",
        "version.jax: 1 in the checkpoint, 2 now",
    ]
    for name in ("train.seed", "data files", "gone"):
        with pytest.raises(CheckpointError, match=rf"{name}: .* in the checkpoint, \(nothing\) now"):
            identity.compare(saved, {key: value for key, value in saved.items() if key != name})


def test_a_base_is_known_by_its_values_types_and_names():
    base = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(4, dtype=jnp.int8), "h": jnp.ones(3, jnp.bfloat16)}
    own = identity.fingerprint(base)
    assert own == identity.fingerprint(dict(reversed(base.items())))
    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    moved = jax.tree.map(
        lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())), base
    )
    assert identity.fingerprint(moved | {"a": jax.device_put(base["a"], split)}) == own
    changed = [
        {"a": base["a"].at[1, 1].set(4.0000005)},
        {"a": base["a"][:, ::-1]},
        {"a": base["a"].reshape(3, 2)},
        {"b": base["b"].at[0].set(1)},
        {"h": jnp.ones(3, jnp.float16)},
    ]
    assert all(identity.fingerprint(base | change) != own for change in changed)
