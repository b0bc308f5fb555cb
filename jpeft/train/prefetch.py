# SPDX-License-Identifier: Apache-2.0
"""A thread that works ahead of the loop: the next values of an iterator, in its order, before they are asked for."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetch(Generic[T]):
    """The values of an iterable, up to `ahead` of them made by a thread before they are taken.

    The order is the iterable's own, and so is an error, which is raised where its value would have come. What the
    thread holds and nobody took is lost, so a position has to come with each value.

    Args:
      values: made in the thread, one at a time.
      ahead: how many values may wait; 0 makes each when it is asked for, without a thread.
      then: what is done with each value in the thread, such as putting it on a device.

    Example:
      >>> with Prefetch(batches.walk(seed), ahead=2) as feed:
      ...     for fed in feed: ...
    """

    def __init__(self, values: Iterable[Any], ahead: int = 2, then: Callable[[Any], T] = lambda value: value):
        self._made: Iterator[T] = map(then, values)
        self._ahead = ahead
        self._closed = threading.Event()
        if ahead:
            self._ready: queue.Queue[Any] = queue.Queue(ahead)
            self._thread = threading.Thread(target=self._work, name="jpeft-prefetch", daemon=True)
            self._thread.start()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        if not self._ahead:
            return next(self._made)
        value, error = self._ready.get()
        if error is not None or value is _END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return value

    def close(self) -> None:
        """Ends the thread; values that wait are dropped."""
        self._closed.set()
        if self._ahead and threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        """Runs in the thread."""
        try:
            for value in self._made:
                if not self._give(value, None):
                    return
            self._give(_END, None)
        except BaseException as error:  # the loop raises it
            self._give(None, error)

    def _give(self, value: Any, error: BaseException | None) -> bool:
        """Puts a value where the loop takes it; False once nobody will."""
        while not self._closed.is_set():
            try:
                self._ready.put((value, error), timeout=0.05)
            except queue.Full:
                continue
            return True
        return False
