# SPDX-License-Identifier: Apache-2.0
"""Steps of a training on disk: they come back bit for bit, and whatever happens to their files is found and named."""

import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.io.checkpoint import MANIFEST, Checkpoints, seal, steps, verify
from jpeft.models import CheckpointError


def state(seed):
    leaves = {
        "layers/a/A": jax.random.normal(jax.random.key(seed), (3, 5)),
        "layers/a/B": jnp.full((2, 7), seed + 0.1, jnp.bfloat16),
        "nothing": jnp.zeros((0, 4)),
        "count": jnp.int32(seed),
        "flag": jnp.bool(seed % 2),
    }
    return leaves, optax.adamw(1e-3).init(leaves)


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module", name="written")
def _written(tmp_path_factory):
    """A folder with the steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("steps") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"losses": [0.1 * step, None]})
    checkpoints.close()
    return folder


@pytest.fixture(name="folder")
def _folder(written, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_a_step_comes_back_bit_for_bit(written):
    checkpoints = Checkpoints(written, keep=3)
    assert checkpoints.newest() == (3, {})
    for step in (1, 3):
        restored, plain = checkpoints.restore(step, like=state(0))
        same(restored, state(step))
        assert plain == {"losses": [0.1 * step, None]}
    checkpoints.close()


def test_arrays_may_be_donated_once_saving_has_begun(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    x = {"x": jnp.arange(300_000.0)}
    checkpoints.save(1, x, {})
    jax.jit(lambda x: {"x": x["x"] * 0 - 1}, donate_argnums=0)(x)
    checkpoints.wait()
    same(checkpoints.restore(1, like={"x": jnp.zeros(300_000)})[0], {"x": jnp.arange(300_000.0)})
    checkpoints.close()


def test_the_last_k_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (5, 10, 15, 20):
        checkpoints.save(step, {"x": jnp.ones(3)}, {})
        assert len(steps(tmp_path / "c")) <= 3
    checkpoints.close()
    assert steps(tmp_path / "c") == [15, 20]


def test_another_trainings_leaves_are_refused_by_name(written):
    leaves, _ = state(0)
    other = {**leaves, "count": jnp.zeros(2), "more": jnp.ones(1)}
    other.pop("flag")
    checkpoints = Checkpoints(written)
    with pytest.raises(CheckpointError, match="is of another training") as caught:
        checkpoints.restore(3, like=(other, state(0)[1]))
    for said in ("[0]['count']: int32[] in the checkpoint, float32[2] here", "absent in the checkpoint", "absent here"):
        assert said in str(caught.value)
    checkpoints.close()


def files(step):
    """Every file that the manifest speaks of, and the manifest."""
    return [f for f in sorted(step.rglob("*")) if f.is_file() and f.parent != step] + [step / MANIFEST]


def test_every_flipped_bit_is_found(folder):
    """200 bits of all files of a step, each flipped alone."""
    rng, step = random.Random(0), folder / "3"
    targets = files(step)
    assert len(targets) > 5
    for trial in range(200):
        file = targets[trial % len(targets)]
        content = file.read_bytes()
        if not content:
            continue
        at = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        found = verify(step)
        assert found, (file, at)
        assert file.name in found[0]
        file.write_bytes(content)
    assert verify(step) == []


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_every_file_cut_short_is_found(folder, kept):
    for file in files(folder / "3"):
        content = file.read_bytes()
        if content:
            file.write_bytes(content[: int(kept * len(content))])
            assert file.name in verify(folder / "3")[0]
            file.write_bytes(content)


def test_every_missing_file_is_found(folder):
    for file in files(folder / "3"):
        content = file.read_bytes()
        file.unlink()
        assert file.name in verify(folder / "3")[0]
        file.write_bytes(content)


def test_the_newest_good_step_is_used_and_the_faults_of_newer_ones_are_named(folder):
    (folder / "12").mkdir()  # emptied
    (folder / "11.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # interrupted
    shutil.copytree(folder / "3", folder / "10")
    (folder / "10" / MANIFEST).unlink()  # half-written
    data = max(files(folder / "3"), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    checkpoints = Checkpoints(folder)
    good, faults = checkpoints.newest()
    assert good == 2
    assert sorted(faults) == [3, 10]
    assert data.name in faults[3][0]
    assert "no MANIFEST.json" in faults[10][0]
    checkpoints.drop_after(good)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    same(checkpoints.restore(good, like=state(0))[0], state(2))
    checkpoints.save(3, state(3), {})  # in the damaged one's place
    checkpoints.close()
    assert verify(folder / "3") == []


def test_no_good_step_is_an_error_and_none_at_all_is_not(folder, tmp_path):
    assert Checkpoints(tmp_path / "none").newest() == (None, {})
    for step in steps(folder):
        (folder / str(step) / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"no step in .* can be restored:\n  1/MANIFEST.json is damaged"):
        Checkpoints(folder).newest()


def test_a_full_disk_leaves_the_older_step_and_says_what_is_needed(tmp_path):
    """The largest file that this process may write is 64 KiB: the system's own refusal, in the middle of a write."""
    checkpoints = Checkpoints(tmp_path / "c")
    noise = jax.random.normal(jax.random.key(0), (100_000,))
    checkpoints.save(1, {"x": noise}, {})
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        checkpoints.save(2, {"x": noise + 1}, {})
        with pytest.raises(OSError, match=r"checkpoint 2 was not written: it needs 4\d\d,\d\d\d bytes") as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step 1 remains" in str(caught.value)
    again = Checkpoints(tmp_path / "c")
    assert again.newest() == (1, {})
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]  # what was left of 2 is swept
    same(again.restore(1, like={"x": noise})[0], {"x": noise})
    again.close()


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"it needs [\d,]+ bytes in .*, where 1,000 are free; there is no older one"):
        checkpoints.save(1, {"x": jnp.ones(100)}, {})
    assert not (tmp_path / "c").exists()


def test_a_manifest_is_of_what_is_there(tmp_path):
    (tmp_path / "1" / "deep").mkdir(parents=True)
    (tmp_path / "1" / "deep" / "a").write_bytes(b"one")
    seal(tmp_path / "1")
    assert verify(tmp_path / "1") == []
    (tmp_path / "1" / "deep" / "a").write_bytes(b"two")
    assert verify(tmp_path / "1") == ["1/deep/a is not what was written: its SHA-256 is another"]
