"""The experts' states of a run, kept on the disk: when, and the identity under which they are found again."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nanothink import __version__
from nanothink.config import TrainMLAConfig
from nanothink.models import shape_sections
from nanothink.reporter import Reporter
from nanothink.runs.preparing import RunSetup
from nanothink.training.expert_states import ExpertStates, Shape, open_states, states_bytes


def kept_bytes(setup: RunSetup) -> int:
    """Upper bound on the disk space of a run's states; 0 if they are not kept."""
    shape, training = _shape(setup), setup.training
    if shape is None or setup.plan.epochs == 1:
        return 0
    assert isinstance(training, TrainMLAConfig)
    return needed if (needed := states_bytes(shape)) <= training.states_disk_gb * 1e9 else 0


def _shape(setup: RunSetup) -> Shape | None:
    """Blocks, experts, length and width of the states; None if they are not kept.

    Kept on a CPU only: elsewhere it is not shown that the states of a block are the same bits in any batch,
    nor that keeping them is faster.
    """
    training = setup.training
    if not isinstance(training, TrainMLAConfig) or not training.states_disk_gb:
        return None
    if setup.precision.device.type != "cpu":
        return None
    model = setup.config.model
    if any(inside.config.model.d_model != model.d_model for inside in setup.inside):
        return None  # states are kept in blocks of one width
    return setup.batches.n_blocks, len(setup.inside), model.max_seq_len, model.d_model


def keep_states(
    setup: RunSetup, entries: Sequence[Mapping[str, Any]], reporter: Reporter
) -> ExpertStates | None:
    """Open the kept states of the run's experts, which ``entries`` describe; None if they are not kept.

    A run of one epoch reads states that others have kept, but keeps none, since it needs each only once.
    """
    shape = _shape(setup)
    if shape is None:
        return None
    assert isinstance(setup.training, TrainMLAConfig)
    experts = [
        {
            "kind": inside.kind,
            "shape": inside.config.model_dump(mode="json", include={"model", *shape_sections(inside.kind)}),
            "weights": entry["digest"],
        }
        for inside, entry in zip(setup.inside, entries, strict=True)
    ]
    identity: dict[str, Any] = {
        "experts": experts,
        "data": setup.tokens.fingerprint,
        "products": setup.precision.name,
        # anything else that could change a last bit
        "nanothink": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "processor": {name: str(has) for name, has in torch.cpu.get_capabilities().items()},
    }
    return open_states(
        setup.corpus.root,
        identity,
        shape,
        budget_bytes=int(setup.training.states_disk_gb * 1e9),
        begin=setup.plan.epochs > 1,
        number=setup.batches.number,
        reporter=reporter,
    )
