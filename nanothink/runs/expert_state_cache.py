"""Whether the experts' states of a run are kept on the disk, and what they depend on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from nanothink import __version__
from nanothink.config import TrainMLAConfig
from nanothink.models import shape_sections
from nanothink.models.nanothink import NanoThink
from nanothink.reporter import Reporter
from nanothink.runs.preparing import RunSetup
from nanothink.runs.saved_model import weights_digest
from nanothink.training.expert_states import ExpertStates, Shape, open_states, states_bytes


def kept_bytes(setup: RunSetup) -> int:
    """What a run's states will take at most on the disk; 0 where they will not be kept."""
    shape, training = _shape(setup), setup.training
    if shape is None or setup.plan.epochs == 1:
        return 0
    assert isinstance(training, TrainMLAConfig)
    return needed if (needed := states_bytes(shape)) <= training.states_disk_gb * 1e9 else 0


def _shape(setup: RunSetup) -> Shape | None:
    """Blocks, experts, length and width of the states that are to be kept; None where none are.

    Only on a CPU: elsewhere nobody has shown that a block's states are the same bits whatever stands beside
    it, or that it pays.
    """
    training = setup.training
    if not isinstance(training, TrainMLAConfig) or not training.states_disk_gb:
        return None
    if setup.precision.device.type != "cpu":
        return None
    model = setup.config.model
    return setup.batches.n_blocks, len(setup.inside), model.max_seq_len, model.d_model


def keep_states(setup: RunSetup, model: NanoThink, reporter: Reporter) -> ExpertStates | None:
    """Where the states of ``model``'s experts are kept.

    A run of one epoch reads what others have left, but leaves nothing: it would not come back to it.
    """
    shape = _shape(setup)
    if shape is None:
        return None
    assert isinstance(setup.training, TrainMLAConfig)
    experts = [
        {
            "kind": inside.kind,
            "shape": inside.config.model_dump(mode="json", include={"model", *shape_sections(inside.kind)}),
            "weights": weights_digest(expert.state_dict()),
        }
        for inside, expert in zip(setup.inside, model.experts, strict=True)
    ]
    identity: dict[str, Any] = {
        "experts": experts,
        "data": setup.tokens.fingerprint,
        "products": setup.precision.name,
        # what else decides about a last bit
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
