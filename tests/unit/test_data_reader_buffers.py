"""Memory that is used again: not while anything made in it is held, and as soon as nothing is."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from pipelines.buffers import Buffers, _rounded


def test_memory_is_used_again_when_nobody_holds_it_and_not_before() -> None:
    buffers = Buffers()
    one = buffers.tensor((4, 5, 3))
    place = one.data_ptr()
    views = [one.permute(2, 0, 1)[1:], one.numpy()[0], one.view(-1)]
    del one
    while views:
        gc.collect()
        assert buffers.tensor((4, 5, 3)).data_ptr() != place
        views.pop()
    gc.collect()
    found = {buffers.tensor((60,)).data_ptr() for _ in range(3)}
    held = [buffers.tensor((60,)) for _ in range(3)]
    assert place in found | {tensor.data_ptr() for tensor in held}


def test_plain_memory_is_used_again_for_what_is_a_little_larger_or_smaller() -> None:
    buffers = Buffers(spare=2)
    memory = buffers.bytes(1_000_000)
    memory[:3] = b"abc"
    assert (len(memory), memory.readonly, memory.format) == (1_000_000, False, "B")
    address = np.frombuffer(memory, np.uint8).ctypes.data
    part = memory[:3]
    del memory
    gc.collect()
    assert np.frombuffer(buffers.bytes(1_000_001), np.uint8).ctypes.data != address
    assert part == b"abc"
    del part
    gc.collect()
    assert np.frombuffer(buffers.bytes(990_000), np.uint8).ctypes.data == address
    assert np.frombuffer(buffers.bytes(500_000), np.uint8).ctypes.data != address


def test_no_more_than_the_spare_pieces_wait() -> None:
    buffers = Buffers(spare=2)
    held = [buffers.bytes(1000) for _ in range(5)]
    places = [np.frombuffer(memory, np.uint8).ctypes.data for memory in held]
    while held:
        held.pop(0)
        gc.collect()
    assert len(buffers._spare) == 2
    # the last one first, which may still be in the CPU's caches
    again = [
        np.frombuffer(memory, np.uint8).ctypes.data for memory in (buffers.bytes(1000), buffers.bytes(0))
    ]
    assert again[0] == places[-1]


@pytest.mark.parametrize("num_bytes", [0, 1, 31, 32, 33, 100, 2**20 - 1, 2**20, 2**20 + 1, 10**9])
def test_memory_is_rounded_up_by_a_sixteenth_at_most(num_bytes: int) -> None:
    assert num_bytes <= _rounded(num_bytes) <= num_bytes * 17 // 16
    assert _rounded(_rounded(num_bytes)) == _rounded(num_bytes)


def test_what_is_held_keeps_its_content_and_kinds_and_sizes_do_not_mix() -> None:
    buffers, held = Buffers(), []
    for number in range(40):
        dtype = torch.float32 if number % 2 else torch.uint8
        tensor = buffers.tensor((number % 3 + 1, 4), dtype)
        assert (tuple(tensor.shape), tensor.dtype) == ((number % 3 + 1, 4), dtype)
        tensor.fill_(number)
        if number % 4 == 1:
            held.append((number, tensor))
    assert all(bool((tensor == number).all()) for number, tensor in held)


def test_memory_of_one_size_is_found_behind_that_of_another() -> None:
    buffers = Buffers(spare=2)
    small, large = buffers.bytes(2**16), buffers.bytes(2**20)
    where = np.frombuffer(small, np.uint8).ctypes.data
    del small
    del large
    again = buffers.bytes(2**16)
    assert np.frombuffer(again, np.uint8).ctypes.data == where
