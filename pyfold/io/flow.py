"""Work beside the work: what is needed next is read ahead of it, what it has made is written behind it, in order, in bounds.

A thread each. Bounds are bytes: of what has been read and not taken, and of what has been put and not written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Stage:
    """A thread, what it shares under one condition, and the failure that ended it."""

    def __init__(self, name: str) -> None:
        self._held = 0  # bytes
        self._changed = threading.Condition()
        self._stopped = False  # or asked to stop
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as failure:
            self._failure = failure
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._ended.set()

    def _work(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        """Until the thread is done, however often Ctrl-C is pressed: it reads and writes files that will then be closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        pressed: KeyboardInterrupt | None = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except KeyboardInterrupt as again:
                pressed = again
        if pressed:
            raise pressed


class Ahead(_Stage, Generic[T]):
    """Makes the ``reads``, in order, up to ``capacity`` bytes ahead; one that is waited for is made whatever its size."""

    def __init__(self, reads: Iterable[tuple[int, Callable[[], T]]], capacity: int) -> None:
        """``reads``: (bytes of the result, what returns it)."""
        super().__init__("reader")
        self._capacity = capacity
        self._reads = reads
        self._results: deque[tuple[int, T]] = deque()
        self._waiting = False

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def take(self) -> T:
        """The next result; raises what reading it raised."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._results or self._stopped)
            self._waiting = False
            if not self._results:
                assert self._failure, "more is taken than is read"
                raise self._failure
            n_bytes, result = self._results.popleft()
            self._held -= n_bytes
            self._changed.notify_all()
            return result

    def _work(self) -> None:
        for n_bytes, read in self._reads:
            with self._changed:
                self._changed.wait_for(lambda: self._has_room(n_bytes) or self._stopped)  # noqa: B023
                if self._stopped:
                    return
                self._held += n_bytes
            result = read()
            with self._changed:
                self._results.append((n_bytes, result))
                self._changed.notify_all()
            del result

    def _has_room(self, n_bytes: int) -> bool:
        return self._held + n_bytes <= self._capacity or (self._waiting and not self._results)


class Behind(_Stage):
    """Carries out what is ``put``, in order; on a normal exit all of it has been, and on another the rest is dropped."""

    def __init__(self) -> None:
        super().__init__("writer")
        self._actions: deque[tuple[int, Callable[[], Any]]] = deque()

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                with self._changed:
                    self._changed.wait_for(lambda: not self._actions or self._stopped)
        finally:
            self._stop()
        if kind is None and self._failure:
            raise self._failure

    def put(self, n_bytes: int, action: Callable[[], Any]) -> None:
        """Have ``action`` done, which holds so many bytes; raises what an earlier one raised."""
        with self._changed:
            if self._failure:
                raise self._failure
            self._actions.append((n_bytes, action))
            self._held += n_bytes
            self._changed.notify_all()

    def wait(self, n_bytes: int) -> None:
        """Until actions that hold no more than so many bytes are left to do; raises what one raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._held <= n_bytes or self._stopped)
            if self._failure:
                raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._actions or self._stopped)
                if self._stopped:
                    return
                n_bytes, action = self._actions[0]
            action()
            del action
            with self._changed:
                self._actions.popleft()
                self._held -= n_bytes
                self._changed.notify_all()
