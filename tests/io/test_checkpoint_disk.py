# SPDX-License-Identifier: Apache-2.0
"""A disk that really is full: a file system of 1 MiB, in memory."""

import errno
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jpeft.io.checkpoint import Checkpoints, steps

#: Of float32: two steps of so many fit, with what orbax writes beside them, and a third does not.
NUMBERS = 100_000


@pytest.fixture(name="disk")
def _disk(tmp_path):
    """A folder on a disk of 1 MiB; where nothing may be mounted, `test_checkpoint.py` limits the sizes of files."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"absent: the right to mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def noise(seed):
    return {"x": jax.random.normal(jax.random.key(seed), (NUMBERS,))}


def saved(checkpoints, step):
    checkpoints.save(step, noise(step), {})
    checkpoints.wait()


@pytest.mark.parametrize("noticed", ["before", "in the middle"])
def test_a_full_disk_leaves_the_older_steps(disk, monkeypatch, noticed):
    """By the room that is left; and where others take it meanwhile, by the write that fails."""
    checkpoints = Checkpoints(disk / "c", keep=3)
    for step in (1, 2):
        saved(checkpoints, step)
    if noticed == "in the middle":
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda place: real(place)._replace(free=2**30))
    with pytest.raises(OSError, match=r"checkpoint 3 was not written: it needs 4\d\d,\d\d\d bytes") as caught:
        saved(checkpoints, 3)
    assert "step 2 remains" in str(caught.value)
    assert noticed == "in the middle" or caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    again = Checkpoints(disk / "c", keep=1)
    assert again.newest() == (2, {})
    np.testing.assert_array_equal(again.restore(2, like=noise(0))[0]["x"], noise(2)["x"])
    shutil.rmtree(disk / "c" / "1")  # room is made
    again.save(3, noise(3), {})
    again.close()
    assert steps(disk / "c") == [3]
    assert Checkpoints(disk / "c").newest() == (3, {})
