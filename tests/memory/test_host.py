"""Copies in host memory: every bit comes back, in few pieces, whatever the tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowvram_grpo.memory import host
from lowvram_grpo.memory.host import HostBytes, upload

KINDS = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(0, 2**7, (n, 3), generator=generator).to(kind) for n, kind in zip((70, 41, 1, 13, 8), KINDS)]
    odd = torch.tensor([float("nan"), -0.0, float("inf")])
    across = torch.randn(12, 20, generator=generator).T  # not contiguous
    return [*made, odd, across, torch.tensor(3.5), torch.empty(0, 4), torch.empty(2, device="meta")]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("chunk, gathered", [(2**25, 2**24), (100, 2**24), (500, 300), (64, 0)])
def test_bits_come_back(monkeypatch, chunk, gathered):
    monkeypatch.setattr(host, "_CHUNK", chunk)
    monkeypatch.setattr(host, "_GATHERED", gathered)
    kept, chunks = HostBytes(), None
    for seed in range(2):  # the second time into the same memory
        given = tensors(seed)
        expected = [bits(t).clone() for t in given if not t.is_meta]
        places = kept.keep(given)
        now = [piece.data_ptr() for piece in kept._chunks]
        assert chunks in (None, now)
        chunks = now
        for tensor, place in zip(given, places):
            if not tensor.is_meta:
                tensor.zero_()
            kept.put_back(tensor, place)
        assert all(torch.equal(bits(t), e) for t, e in zip(given, expected))


def test_small_tensors_leave_together(monkeypatch):
    copies, inner = [], torch.Tensor.copy_

    def copy(into, source, *args, **kwargs):
        copies.append(source.nbytes)
        return inner(into, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    HostBytes().keep([torch.ones(16, 8) for _ in range(300)])
    assert copies == [300 * 16 * 8 * 4]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 MiB.")

    monkeypatch.setattr(torch, "cat", full)  # the device has no room to pack them
    copies.clear()
    kept, given = HostBytes(), [torch.full((4,), float(i)) for i in range(3)]
    places = kept.keep(given)
    assert copies == [16, 16, 16]
    for i, (tensor, place) in enumerate(zip(given, places)):
        kept.put_back(tensor.zero_(), place)
        assert (tensor == i).all()


def test_an_upload_is_one_copy_of_equal_tensors():
    given = [t for t in tensors() if not t.is_meta]
    moved = upload(given, torch.device("cpu"), pack=True)
    assert all(bits(a).equal(bits(b)) and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(given, moved))
    assert len({t.untyped_storage().data_ptr() for t in moved if t.numel()}) == 1
    assert upload(given, torch.device("cpu"))[0] is given[0]


def test_where_the_system_locks_no_more_pages_any_memory_does(monkeypatch):
    inner = torch.empty

    def empty(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        return inner(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    assert host.host_buffer(5, pinned=True).shape == (5,)


def test_bytes_that_are_still_on_their_way_are_not_read(monkeypatch):
    """Where the host itself puts them in order."""

    class OnACard(torch.Tensor):
        is_cuda = property(lambda self: True)

    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    host = HostBytes()
    for tensor, expected in ((torch.randn(3, 4), 0), (torch.randn(3, 4).T, 1)):
        was = tensor.clone()
        (kept,) = host.keep([tensor])
        tensor.zero_()
        host.put_back(tensor.as_subclass(OnACard), kept)
        assert torch.equal(tensor, was) and len(waits) == expected
