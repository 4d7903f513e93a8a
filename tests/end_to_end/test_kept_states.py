"""Phase 2 over the experts' states on the disk: their bits change nothing, lost or damaged; its stages."""

from __future__ import annotations

import math
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from combined_runs import KINDS, PHASE, SHAPE, STEM
from reports import Told
from struck_runs import assert_same, metrics

from nanothink.checkpoints.file import read_checkpoint
from nanothink.config.run import resolve_config
from nanothink.errors import InterruptedRun
from nanothink.models import COMBINED
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.pretraining import pretrain as pretrain_run
from nanothink.runs.resuming import RunSpec
from nanothink.training.events import RunStarted, StepDone


class Phase2:
    """Phase 2 over a copy of the data, so that what is kept beside it is known."""

    per_epoch = 3
    """Steps of 64 blocks."""

    def __init__(self, corpus: Path, experts: Path, root: Path) -> None:
        self.data, self.root = root / "data", root
        shutil.copytree(corpus, self.data, ignore=shutil.ignore_patterns(".nanothink", "letters"))
        self.experts = tuple(experts / f"{kind}_expert.pt" for kind in KINDS)

    def train(
        self, name: str, *, stop_after: int | None = None, resume: str | None = None, gb: float = 4
    ) -> str:
        """What was said. ``stop_after``: SIGINT after so many steps."""
        said: list[str] = []
        values = PHASE | {
            "data.data_dir": self.data,
            "train_mla.batch_size": 64,
            "train_mla.grad_accum_steps": 1,
            "train_mla.max_steps": 2 * self.per_epoch + 2,
            "train_mla.sample_tokens": 0,
            "train_mla.states_disk_gb": gb,
        }

        def observe(event: object) -> None:
            if isinstance(event, RunStarted):
                assert math.ceil(event.n_blocks / 64) == self.per_epoch
                assert event.epochs == 3
            if isinstance(event, StepDone) and event.step == stop_after:
                signal.raise_signal(signal.SIGINT)

        spec = RunSpec(
            COMBINED, self.root / name, resume=resume, device="cpu", experts=() if resume else self.experts
        )
        assignments = [f"{name}={value}" for name, value in values.items()]
        with nullcontext() if stop_after is None else pytest.raises(InterruptedRun):
            pretrain_run(
                spec,
                lambda base: resolve_config(base=base, assignments=assignments),
                Told(said.append, event=observe),
            )
        return "\n".join(said)

    @property
    def kept(self) -> list[Path]:
        return sorted((self.data / ".nanothink" / "states").glob("*"))

    def assert_same(self, name: str, other: str) -> None:
        ours, theirs = (dict(read_checkpoint(self.root / n / f"{STEM}.pt")) for n in (name, other))
        assert ours.pop("config") is not None
        assert theirs.pop("config") is not None
        assert_same(ours, theirs)
        assert metrics(self.root / name, STEM) == metrics(self.root / other, STEM)


@pytest.fixture
def phase2(tiny_corpus: Path, experts: Path, tmp_path: Path) -> Phase2:
    return Phase2(tiny_corpus, experts, tmp_path)


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("transformer", {"calibrating: reading", "calibrating: fitting", "validating", "writing samples"}),
        (
            COMBINED,
            {"calibrating: reading", "calibrating: fitting", "joint gate: fitting", "writing samples"},
        ),
    ],
)
def test_each_stage_of_a_run_is_told_to_its_end(
    kind: str, stages: set[str], phase2: Phase2, tiny_tokenizer: Path
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    expert = {"train_expert.max_steps": 2, "train_expert.sample_tokens": 4, "data.tokenizer": tiny_tokenizer}
    combined = {"train_mla.fit": "gate", "vector_store.enabled": True, "vector_store.max_keys": 500}
    values = PHASE | combined if kind == COMBINED else SHAPE | expert
    assignments = [f"{name}={value}" for name, value in {**values, "data.data_dir": phase2.data}.items()]
    spec = RunSpec(kind, phase2.root, device="cpu", experts=phase2.experts if kind == COMBINED else ())
    reporter = Told(progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    pretrain_run(spec, lambda base: resolve_config(base=base, assignments=assignments), reporter)
    assert stages <= told.keys()
    for stage, reports in told.items():
        assert all(done <= total for done, total in reports), stage
        assert reports[-1][0] == reports[-1][1], stage


def test_a_stop_while_the_gate_is_fitted_ends_the_run_and_a_resume_fits_it(phase2: Phase2) -> None:
    values = {"train_mla.fit": "gate", "vector_store.enabled": True, "vector_store.max_keys": 500}
    values = {**PHASE, **values, "data.data_dir": phase2.data}
    assignments = [f"{name}={value}" for name, value in values.items()]

    def trained(folder: str, reporter: Reporter, **more: Any) -> Any:
        spec = RunSpec(COMBINED, phase2.root / folder, device="cpu", **more)
        pretrain_run(spec, lambda base: resolve_config(base=base, assignments=assignments), reporter)
        return dict(read_checkpoint(phase2.root / folder / f"{STEM}.pt"))["model_state"]

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "joint gate: fitting" and done == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun, match=r"Paused and saved\. Resume with: nanothink resume"):
        trained("stopped", Told(progress=stop), experts=phase2.experts)
    resumed = trained("stopped", SILENT, resume="newest")
    expected = trained("whole", SILENT, experts=phase2.experts)
    assert any("joint_gate" in name for name in expected)
    assert_same(resumed, expected)


def test_kept_states_change_no_bit(phase2: Phase2) -> None:
    """Three epochs without, with, and again over what is there."""
    assert "states" not in phase2.train("without", gb=0)
    assert phase2.kept == []
    said = phase2.train("within")
    (folder,) = phase2.kept
    kept = re.search(rf"The experts' states are kept in {folder}: (\d+) blocks", said)
    assert kept is not None, said
    phase2.assert_same("within", "without")
    assert f"{kept[1]} of {kept[1]} blocks are there already" in phase2.train("again")
    phase2.assert_same("again", "without")
    assert phase2.kept == [folder]
    assert "The experts' states take" in phase2.train("tight", gb=0.001)
    phase2.assert_same("tight", "without")


def test_states_lost_or_damaged_between_two_halves_of_a_run_change_no_bit(phase2: Phase2) -> None:
    """Stopped within the first epoch, then lost; stopped within the second, then half of it damaged."""
    phase2.train("without", gb=0)
    phase2.train("cut", stop_after=phase2.per_epoch // 2)
    (folder,) = phase2.kept
    assert (folder / "marks.u64").read_bytes().count(1) >= 64  # a mark's bit that says that it is there
    shutil.rmtree(folder)
    phase2.train("cut", stop_after=phase2.per_epoch + 2, resume="newest")
    states = folder / "states.f32"
    content = states.read_bytes()
    assert any(content)
    states.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    said = phase2.train("cut", resume="newest")
    assert "blocks are there already" in said
    assert "damaged; they are made again" in said
    phase2.assert_same("cut", "without")
