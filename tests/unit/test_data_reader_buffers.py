"""Memory that is used again: not while anything made in it is held, and as soon as nothing is."""

from __future__ import annotations

import gc

import torch

from pipelines.buffers import Buffers


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
