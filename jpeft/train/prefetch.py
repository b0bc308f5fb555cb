# SPDX-License-Identifier: Apache-2.0
"""A thread that works ahead of the loop: the next values of an iterator, in its order, before they are asked for."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The values of an iterable, up to `ahead` of them made by a thread before they are taken.

    The order is the iterable's own, and so is an error, which is raised where its value would have come. What the
    thread holds and nobody took is lost, so a position has to come with each value.

    Args:
      values: made in the thread, one at a time.
      ahead: how many values may wait or be in the making; 0 makes each when it is asked for, without a thread.
      then: what is done with each value in the thread, such as putting it on a device.

    Example:
      >>> with Prefetch(batches.walk(seed), ahead=2) as feed:
      ...     for fed in feed: ...
    """

    def __init__(self, values: Iterable[Any], ahead: int = 2, then: Callable[[Any], T] = lambda value: value):
        self._made: Iterator[T] = map(then, values)
        self._thread = ThreadPoolExecutor(1, "jpeft-prefetch") if ahead else None
        self._coming: collections.deque[Future[T]] = collections.deque()
        for _ in range(ahead):
            self._order()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._made)
        if not self._coming:
            raise StopIteration
        coming = self._coming.popleft()
        if coming.exception() is not None:
            self.close()
        else:
            self._order()
        return coming.result()

    def close(self) -> None:
        """Ends the thread; values that wait are dropped, and no more are made."""
        self._made = iter(())
        self._coming.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _order(self) -> None:
        assert self._thread is not None
        self._coming.append(self._thread.submit(next, self._made))
