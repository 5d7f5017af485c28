"""Blocks that are held, shared, promised and set aside."""

import numpy as np
import pytest

from parscale.block_memory import BlockMemory, OutOfBlocksError
from sharding.settings import InputError


def test_a_block_is_free_when_its_last_holder_releases_it():
    memory = BlockMemory(4)
    first = memory.allocate((0,), promised=False)
    memory.hold(first)
    memory.release(first)
    assert memory.held == 1
    memory.release(first)
    assert memory.held == 0
    assert len({memory.allocate((0,), promised=False) for _ in range(3)}) == 3
    with pytest.raises(OutOfBlocksError):
        memory.allocate((0,), promised=False)


def test_the_first_block_of_every_part_is_nobodys():
    memory = BlockMemory(3, 2)
    blocks = [memory.allocate((0, 1), promised=False) for _ in range(2)]
    assert sorted(zip(*blocks, strict=True)) == [(1, 2), (4, 5)]
    assert [memory.nobodys(part) for part in range(2)] == [0, 3]


def test_streams_that_read_the_same_block_hold_it_once():
    memory = BlockMemory(3)
    (block,) = memory.allocate((0,), promised=False)
    memory.hold((block, block))
    memory.release((block, block))
    memory.release((block, block))
    assert memory.held == 0


def test_what_is_promised_is_kept_back():
    memory = BlockMemory(6, 2)
    parts = (0, 0, 1)  # of a row, two of whose streams are in the first part
    assert memory.most(parts) == 2
    assert memory.can_promise(parts, 2)
    assert not memory.can_promise(parts, 3)
    memory.promise(parts, 2)
    assert memory.promised == 6
    with pytest.raises(OutOfBlocksError):
        memory.allocate(parts, promised=False)
    memory.allocate((1,), promised=False)
    memory.take_back(parts, 1)
    assert len(set(memory.allocate(parts, promised=True))) == 3
    memory.take_back(parts, 1)
    assert memory.promised == 0
    with pytest.raises(OutOfBlocksError):
        memory.allocate((0, 0, 0, 0), promised=False)


def test_what_is_set_aside_is_nobodys_to_count_on():
    memory = BlockMemory(4, 2)
    memory.set_aside((0, 0))
    assert (memory.held, memory.most((0,)), memory.most((1,))) == (0, 1, 3)
    with pytest.raises(InputError, match="3 blocks for each part"):
        memory.set_aside((0, 0))


def test_any_order_of_holders_ends_with_all_free():
    rng = np.random.default_rng(0)
    memory, held = BlockMemory(20, 2), []
    for _ in range(2000):
        if rng.random() < 0.6:
            try:
                held.append(memory.allocate((0, 1, 1), promised=False))
            except OutOfBlocksError:
                assert memory.held >= 17
        elif held:
            blocks = held[rng.integers(len(held))]
            memory.hold(blocks)
            held.append(blocks)
        if held and rng.random() < 0.6:
            memory.release(held.pop(rng.integers(len(held))))
        assert memory.held == 3 * len(set(held))
    for blocks in held:
        memory.release(blocks)
    assert memory.held == 0
    assert memory.can_promise((0,), 19)
    assert memory.can_promise((1,), 19)
