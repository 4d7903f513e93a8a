"""Estimates of memory, which batch sizes are refused by, beside what is kept and allocated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.models import COMBINED, ExpertDescription, build_model
from nanothink.models.nanothink import NanoThink

VOCAB = 61
KINDS = ("transformer", "state_space", "diffuser")


def config(**more: int) -> Config:
    small = {"model.d_model": 96, "model.max_seq_len": 64, "mla.n_layers": 0} | more
    return resolve_config(assignments=[f"{name}={value}" for name, value in small.items()]).config


def tokens() -> Tensor:
    return torch.randint(VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_memory_estimate_is_near_what_autograd_keeps(
    dtype: torch.dtype, value_bytes: int, layers: int
) -> None:
    shallow = {"transformer.n_layers": 2, "state_space.n_layers": 2, "diffuser.n_layers": 1}
    whole = config(**shallow, **{"mla.n_layers": layers, "diffuser.denoiser_layers": 1})
    parts = [ExpertDescription(kind, kind, whole) for kind in KINDS]
    model = build_model(COMBINED, whole, VOCAB, parts)
    assert isinstance(model, NanoThink)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = tokens()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype is not torch.float32),
    ):
        loss = model.loss(x, x)
    assert loss.requires_grad
    # gradients of the block being worked on, and of what the head reads
    in_flight = 8 * 64 * (value_bytes * (4 * 96 + 3 * model.inner) + 4 * 4 * 96)
    head = VOCAB * (4 * 4 * 96 + 512 * 8)
    estimated = model.activation_bytes(8, 64, value_bytes) - in_flight - head
    assert estimated == pytest.approx(sum(kept.values()), rel=0.1)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator held at a time during the call, on top of what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as watched:
        call()
    found = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("kind", [*KINDS, COMBINED])
@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_estimate_of_reading_is_near_what_is_allocated(
    dtype: torch.dtype, value_bytes: int, kind: str
) -> None:
    whole = config()
    parts = [ExpertDescription(k, k, whole) for k in KINDS]
    model = build_model(kind, whole, VOCAB, parts).eval()
    x = tokens()
    read = model.expert_states if isinstance(model, NanoThink) else model.hidden
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        read(x)  # the first call sets things up
        peak = peak_bytes(lambda: read(x))
    assert model.reading_bytes(8, 64, value_bytes) == pytest.approx(peak, rel=0.15)


def test_the_memory_estimate_counts_the_experts_where_they_need_most() -> None:
    """Large experts under a small model: their reading is the peak, though nothing is kept of it."""
    whole = config(**{"transformer.ffn_mult": 64})
    parts = [ExpertDescription("transformer", "transformer", whole)]
    model = build_model(COMBINED, whole, VOCAB, parts)
    expert = build_model("transformer", whole, VOCAB)
    reading = expert.reading_bytes(8, 64, 4)
    assert model.activation_bytes(8, 64, 4) == reading
    x = tokens()
    model.loss(x, x).backward()  # the gradients are there from now on
    assert reading == pytest.approx(peak_bytes(lambda: model.loss(x, x).backward()), rel=0.15)
