"""Memory for large tensors that is used again: right shapes, no block lent twice, and never more of it than the limit."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyfold.memory import LARGE, Pool, empty

MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 0), (1000, 5003), (LARGE,)], ids=str)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = Pool(0)
    for tensor in (empty(shape, dtype), pool.empty(shape, dtype)):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        tensor.fill_(1)
        assert bool((tensor == 1).all())


def test_a_block_is_used_again() -> None:
    pool = Pool(64 * MIB)
    first = pool.empty((8 * MIB,), torch.uint8)
    address = first.data_ptr()
    assert pool.empty((8 * MIB,), torch.uint8).data_ptr() != address, "it is still lent"
    pool.give_back(first[5:].view(-1))  # a view is as good
    assert pool.empty((3 * MIB, 2), torch.uint8).data_ptr() == address, "one that is not much larger will do"
    stranger = torch.zeros(16 * MIB, dtype=torch.uint8)
    pool.give_back(stranger)
    assert pool.empty((16 * MIB,), torch.uint8).data_ptr() != stranger.data_ptr()


@given(st.integers(0, 64), st.lists(st.tuples(st.booleans(), st.integers(4, 24)), max_size=30))
def test_no_more_exists_than_the_limit_or_what_is_lent(limit: int, steps: list[tuple[bool, int]]) -> None:
    pool, lent = Pool(limit * MIB), []
    for give, size in steps:
        if give and lent:
            pool.give_back(lent.pop(size % len(lent)))
        else:
            lent.append(pool.empty((size * MIB,), torch.uint8))
        assert len({tensor.data_ptr() for tensor in lent}) == len(lent)
        in_use = sum(len(block) for block in pool._lent.values())
        assert pool._exist == in_use + sum(map(len, pool._idle))
        assert pool._exist <= max(limit * MIB, in_use)


def test_what_cannot_be_pinned_does_not_exist() -> None:
    def refuse(block: torch.Tensor) -> None:
        raise MemoryError("not pinned")

    pool = Pool(64 * MIB, refuse)
    with pytest.raises(MemoryError, match="not pinned"):
        pool.empty((8 * MIB,), torch.uint8)
    assert pool._exist == 0


def test_no_thread_waits_for_what_another_has_pinned() -> None:
    asked, go = threading.Event(), threading.Event()

    def pin(block: torch.Tensor) -> None:
        if len(block) > 8 * MIB:
            asked.set()
            assert go.wait(60)

    pool = Pool(64 * MIB, pin)
    small = pool.empty((8 * MIB,), torch.uint8)
    other = threading.Thread(target=pool.block, args=(16 * MIB,))
    other.start()
    assert asked.wait(60)
    pool.give_back(small)
    assert pool.empty((8 * MIB,), torch.uint8).data_ptr() == small.data_ptr()
    go.set()
    other.join()
    assert pool._exist == 24 * MIB


def test_shrinking_leaves_what_is_lent() -> None:
    gone: list[int] = []
    pool = Pool(64 * MIB, unpin=lambda block: gone.append(len(block)))
    kept, idle = pool.empty((8 * MIB,), torch.uint8), pool.empty((16 * MIB,), torch.uint8)
    pool.give_back(idle)
    pool.shrink()
    assert gone == [16 * MIB]
    assert pool._exist == len(kept)


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes: Cannot allocate memory"):
        empty((1 << 60,), torch.uint8)
