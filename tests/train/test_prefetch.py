# SPDX-License-Identifier: Apache-2.0
"""Values made ahead by a thread: the same, in the same order, and no thread that outlives its use."""

import threading
import time

import pytest

from jpeft.train.prefetch import Prefetch


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jpeft-prefetch")]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_order_is_the_iterables_own(ahead):
    assert list(Prefetch(range(20), ahead, lambda value: value * 2)) == [*range(0, 40, 2)]
    assert not running()


def test_values_are_made_before_they_are_asked_for():
    made = []
    with Prefetch((made.append(i) or i for i in range(9)), ahead=2) as feed:
        assert next(feed) == 0
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:  # one taken, two waiting
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2]
    assert not running()
    assert list(feed) == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_its_value_would_have(ahead):
    def values():
        yield 1
        raise ZeroDivisionError("here")

    feed = Prefetch(values(), ahead)
    assert next(feed) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(feed)
    assert not running()


def test_a_walk_without_end_is_closed():
    feed = Prefetch(iter(int, 1), ahead=2)
    assert next(feed) == 0
    feed.close()
    assert not running()
