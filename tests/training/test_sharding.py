"""What several processes share out, as far as one can tell; test_distributed.py has three real ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nanothink.config.run import resolve_config
from nanothink.models import build_model
from nanothink.training.muon_rows import deal
from nanothink.training.sharding import without_memory


@given(costs=st.lists(st.integers(1, 100), max_size=40), n_processes=st.integers(1, 9))
def test_matrices_are_dealt_out_evenly(costs: list[int], n_processes: int) -> None:
    owners = deal(costs, n_processes)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(n_processes)]
    assert max(load) - min(load) <= max(costs, default=0)


def test_a_model_of_which_rows_are_read_has_its_buffers_and_no_parameters() -> None:
    config = resolve_config(assignments=["model.d_model=16", "transformer.n_heads=2"]).config
    for kind in ("transformer", "state_space", "diffuser"):
        with without_memory():
            bare = build_model(kind, config, 20)
        whole = build_model(kind, config, 20)
        assert all(parameter.is_meta for parameter in bare.parameters())
        for (name, own), (other, buffer) in zip(bare.named_buffers(), whole.named_buffers(), strict=True):
            assert name == other
            assert torch.equal(own, buffer), name
        assert {n: p.shape for n, p in bare.named_parameters()} == {
            n: p.shape for n, p in whole.named_parameters()
        }
