"""Memory of each process, and which ways to run fit."""

from __future__ import annotations

from nanothink.config import TrainExpertConfig
from nanothink.config.run import resolve_config
from nanothink.models import build_model
from nanothink.models.nanothink import NanoThink
from nanothink.runs.memory import Choice, ModelSizes, choices

SIZES = ModelSizes(trained=1000, frozen=200, moments=1500, outside_blocks=300, largest_block=100)
MB = 2**20


def used(n_processes: int, shard: str = "full", n_windows: int = 1) -> dict[str, int]:
    memory = SIZES.memory(n_processes, shard, n_windows, 7)  # type: ignore[arg-type]
    assert memory.pop("process")
    return memory


def test_parameters_are_counted_by_what_becomes_of_them() -> None:
    config = resolve_config(assignments=["model.d_model=16", "transformer.n_heads=2"]).config
    model = build_model("transformer", config, 20)
    sizes = ModelSizes.of(model, TrainExpertConfig())
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for _, p in model.parameter_groups()["matrices"])
    in_blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    assert (sizes.trained, sizes.frozen, sizes.moments) == (total, 0, 2 * total - matrices)
    assert sizes.outside_blocks == total - in_blocks
    assert sizes.frozen_gathered == 0
    assert ModelSizes.of(model, TrainExpertConfig(optimizer="adamw")).moments == 2 * total


def test_of_frozen_experts_one_is_gathered_at_a_time() -> None:
    config = resolve_config(assignments=["model.d_model=16", "transformer.n_heads=2", "mla.n_heads=2"]).config
    experts = [build_model("transformer", config, 20) for _ in range(2)]
    model = NanoThink(20, config.model, config.mla, {"a": experts[0], "b": experts[1]})
    alone = ModelSizes.of(experts[0].requires_grad_(True), TrainExpertConfig())
    model.experts.requires_grad_(False)
    expected = alone.outside_blocks + 2 * alone.largest_block
    assert ModelSizes.of(model, TrainExpertConfig()).frozen_gathered == expected


def test_what_is_shared_out_and_what_is_gathered() -> None:
    assert used(1) == {"weights": 4800, "gradients": 4000, "optimizer": 6000, "activations": 7}
    whole = used(4, "none")
    assert (whole["weights"], whole["optimizer"]) == (4800, 6000)
    shared = used(4)
    assert (shared["weights"], shared["optimizer"]) == (1200, 1500)
    assert shared["gathered"] == 4 * (300 + 2 * 100)
    assert shared["gradients"] == 1000 + 4 * (300 + 2 * 100)
    assert used(4, n_windows=2)["gradients"] == 1000 + 4000, "added up whole until the window ends"


def fits(available: int, n_processes: int = 2, **settings: int) -> list[Choice]:
    config = TrainExpertConfig.model_validate(settings)
    return choices(SIZES, config, n_processes, available, lambda n_blocks: n_blocks * MB)


def test_the_smaller_batch_is_offered_where_nothing_else_fits() -> None:
    ample, tight = 2**40, 470 * MB
    assert [(c.name, c.fits) for c in fits(ample)] == [("data-parallel", True), ("sharded", True)]
    found = fits(tight, batch_size=64)
    assert [(c.name, c.fits) for c in found] == [
        ("data-parallel", False),
        ("sharded", False),
        ("smaller batch", True),
    ]
    assert found[-1].settings.endswith("train_expert.batch_size=32 train_expert.grad_accum_steps=2")
    assert not fits(MB)[-1].fits
    assert [c.name for c in fits(ample, 1)] == ["as it is"]
