"""Two processes interrupted and resumed are the same run as two that never were; other numbers agree closely.

As test_exact_resume.py, for several processes: every kind, every moment, every bit. What processes write
together, rolling states and snapshots, are folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from struck_runs import KINDS, LAST_EPOCH, Ended, Ground, assert_same, assert_same_run, metrics, stem

import nanothink
from nanothink.checkpoints import CheckpointStore, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.timeout(900)  # the longest took 170 s on two busy cores

AN_EPOCH = 12  # steps; validation comes every 4
WITH_STORE = "nanothink_mla with a vector store"
ALL_KINDS = (*KINDS, WITH_STORE)
WEIGHTS = {".safetensors", ".gguf"}


def arguments(ground: Ground, kind: str, folder: Path, **changed: Any) -> list[str]:
    more = ["--use-vector-store", "--set", "vector_store.n_neighbours=4"] if kind == WITH_STORE else []
    return [*ground.typed(of(kind), folder, **changed), *more]


def of(kind: str) -> str:
    return "nanothink_mla" if kind == WITH_STORE else kind


def after_step(step: int, *signals: str) -> dict[str, Any]:
    return {"event": "StepDone", "having": {"step": step}, "signals": signals}


def in_backward(n: int, sent: str) -> dict[str, Any]:
    """In the second process; in the middle of an accumulation window if ``n`` is odd."""
    return {"call": "torch:Tensor.backward", "nth": n, "after": True, "signals": [sent], "rank": 1}


def in_save(nth: int, call: str, rank: int, *, after: bool = False) -> dict[str, Any]:
    where = f"nanothink.checkpoints.shards:{call}"
    return {"call": where, "nth": nth, "signals": ["SIGKILL"], "rank": rank, "after": after}


def in_validation(call: str, sent: str) -> dict[str, Any]:
    """In the second process."""
    return {"call": f"nanothink.runs.callbacks:{call}", "signals": [sent], "rank": 1}


MOMENTS: list[tuple[str, dict[str, Any], int]] = [
    # (moment, strike, step of the state that is left). What is done since the rolling state is done again.
    ("one killed with half of the second window done", in_backward(3, "SIGKILL"), 0),
    ("one stopped in a window, which is finished first", in_backward(5, "SIGTERM"), 3),
    (
        "killed with the best file written, and not the rolling state that comes with it",
        {"event": "CheckpointSaved", "having": {"role": "best"}, "signals": ["SIGKILL"]},
        3,
    ),
    ("one killed with its rows written, and no manifest", in_save(1, "_own_rows", 1), 3),
    ("stopped in the middle of an epoch", after_step(6, "SIGINT"), 6),
    ("one killed in a validation", in_validation("score", "SIGKILL"), 6),
    ("one stopped while samples are written, before they count", in_validation("generate", "SIGTERM"), 8),
    ("killed with all written, and the folder not renamed", in_save(1, "sync_tree", 0, after=True), 8),
    (
        "stopped with the last step of an epoch done, and not its validation",
        after_step(AN_EPOCH, "SIGINT"),
        12,
    ),
    (
        "killed with the snapshot written, and not the rolling state that comes with it",
        {"event": "CheckpointSaved", "having": {"role": "epoch"}, "signals": ["SIGKILL"]},
        12,
    ),
    ("killed a step later", after_step(14, "SIGKILL"), 12),
    ("stopped again", after_step(18, "SIGTERM"), 18),
]
FEW = (1, 3, 4, 6)


@pytest.fixture(scope="module")
def by_two(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a kind's run by two processes that was never interrupted. Read only."""

    @cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("two")
        whole(ground.server.run(arguments(ground, kind, folder), processes=2))
        return folder

    return folder_of


def whole(ended: Ended) -> Ended:
    assert set(ended.codes) == {0}, ended.stderr
    return ended


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("transformer", FEW),
        *(pytest.param(k, range(len(MOMENTS)), marks=pytest.mark.bench, id=k) for k in ALL_KINDS),
    ],
)
def test_two_processes_resumed_at_every_moment_are_the_same_run(
    kind: str,
    moments: tuple[int, ...] | range,
    ground: Ground,
    by_two: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, stem(of(kind)))
    for n, (moment, strike, step) in enumerate(MOMENTS[i] for i in moments):
        before = store.rolling()
        more = ["--resume"] if n else []
        ended = ground.server.run([*arguments(ground, kind, tmp_path), *more], strike=strike, processes=2)
        killed = "SIGKILL" in strike["signals"]
        struck = strike.get("rank", 0)
        assert ended.codes[struck] == (-9 if killed else 130), f"{moment}: {ended.codes} {ended.stderr}"
        assert ended.codes[1 - struck] == (1 if killed else 130), f"{moment}: {ended.codes} {ended.stderr}"
        assert "Traceback" not in ended.stderr, moment
        assert not n or f"Resuming from {before[-1]}" in ended.stderr, moment
        assert all(path.suffix == ".dcp" for path in store.rolling())
        assert read_checkpoint(store.rolling()[-1])["step"] == step, moment
    before = store.rolling()
    ended = whole(ground.server.run(["resume", "--checkpoint-dir", str(tmp_path)], processes=2))
    assert f"Resuming from {before[-1]}" in ended.stderr
    assert_same_run(by_two(kind), tmp_path, stem(of(kind)))


@pytest.mark.bench
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_two_processes_resume_from_the_best_state_and_from_a_snapshot(
    kind: str, ground: Ground, by_two: Callable[[str], Path], tmp_path: Path
) -> None:
    """These two are left where someone has removed the rolling state."""
    typed, store = arguments(ground, kind, tmp_path), CheckpointStore(tmp_path, stem(of(kind)))
    for step, left in ((6, store.best), (14, tmp_path / f"{store.stem}_epoch1.dcp")):
        ended = ground.server.run([*typed, "--resume"], strike=after_step(step, "SIGINT"), processes=2)
        assert set(ended.codes) == {130}, ended.stderr
        for path in store.rolling():
            shutil.rmtree(path)
        assert store.newest() == left
    whole(ground.server.run([*typed, "--resume"], processes=2))
    assert_same_run(by_two(kind), tmp_path, store.stem)


@pytest.mark.bench
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_two_processes_stop_early_where_one_does_and_train_on_exactly(
    kind: str, ground: Ground, tmp_path: Path
) -> None:
    """With rates so small that no weight moves, the first validation is the best."""
    still = {"lr": 1e-30, "lr_min_fraction": 1.0}
    early, patient = ({"early_stopping_patience": n} for n in (2, 100))
    folders = [tmp_path / name for name in ("struck", "early", "patient", "alone")]
    struck, stopped, patiently, by_one = folders
    name = stem(of(kind))
    ends = 8 if of(kind) == "nanothink_mla" else 12  # it validates before the first step too
    whole(ground.server.run(arguments(ground, kind, stopped, **still, **early), processes=2))
    whole(ground.server.run(arguments(ground, kind, patiently, **still, **patient), processes=2))
    assert ground.server.run(arguments(ground, kind, by_one, **still, **early)).code == 0
    for folder in (stopped, by_one):
        assert max(line["step"] for line in metrics(folder, name)) == ends

    typed = arguments(ground, kind, struck, **still, **early)
    ended = ground.server.run(typed, strike=after_step(ends - 1, "SIGINT"), processes=2)
    assert set(ended.codes) == {130}, ended.stderr
    whole(ground.server.run([*typed, "--resume"], processes=2))
    assert_same_run(stopped, struck, name)
    assert "This run is complete" in whole(ground.server.run([*typed, "--resume"], processes=2)).stderr

    more = arguments(ground, kind, struck, **still, **patient)
    whole(ground.server.run([*more, "--resume"], processes=2))
    last = f"{name}_epoch{LAST_EPOCH}.dcp"
    left, right = (dict(read_checkpoint(folder / last)) for folder in (patiently, struck))
    assert_same(left, right, last)


@pytest.mark.bench
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_two_three_and_one_again_end_closely_where_one_does(
    kind: str, ground: Ground, tmp_path: Path
) -> None:
    """But for rounding: sums are formed in another order. Stopped by a signal, and resumed each time."""
    by_one, by_several, name = tmp_path / "one", tmp_path / "several", stem(of(kind))
    shape: dict[str, Any] = {"batch_size": 3, "lr": 1e-3}
    assert ground.server.run(arguments(ground, kind, by_one, **shape)).code == 0
    typed = arguments(ground, kind, by_several, **shape)
    for n_processes, step in ((1, 3), (2, 6), (3, 11)):
        strike = after_step(step, "SIGINT")
        ended = ground.server.run([*typed, "--resume"], strike=strike, processes=n_processes)
        assert set(ended.codes) == {130}, ended.stderr
        (rolling,) = CheckpointStore(by_several, name).rolling()
        assert rolling.suffix == (".dcp" if n_processes > 1 else ".pt")
    assert ground.server.run(["resume", "--checkpoint-dir", str(by_several)]).code == 0
    recorded = [metrics(folder, name) for folder in (by_one, by_several)]
    for left, right in zip(*recorded, strict=True):
        assert (left["event"], left["step"]) == (right["event"], right["step"])
        assert left["loss"] == pytest.approx(right["loss"], rel=5e-6)
    one, other = (read_checkpoint(folder / f"{name}_epoch{LAST_EPOCH}.pt") for folder in (by_one, by_several))
    for key, tensor in one["model_state"].items():
        difference = torch.linalg.vector_norm(other["model_state"][key] - tensor)
        assert difference <= 2e-3 * torch.linalg.vector_norm(tensor), key


@pytest.mark.parametrize(
    "kind", ["transformer", *(pytest.param(k, marks=pytest.mark.bench) for k in ALL_KINDS[1:])]
)
def test_every_command_makes_of_a_folder_what_it_makes_of_a_file(
    kind: str, ground: Ground, tmp_path: Path
) -> None:
    """All that is left of a run of two processes that was stopped early; and the same as a file."""
    name = stem(of(kind))
    ended = ground.server.run(arguments(ground, kind, tmp_path), strike=after_step(3, "SIGINT"), processes=2)
    assert set(ended.codes) == {130}, ended.stderr
    CheckpointStore(tmp_path, name).best.unlink(missing_ok=True)  # NanoThink validates first
    (folder,) = CheckpointStore(tmp_path, name).rolling()
    file = tmp_path / f"{name}_epoch7.pt"
    write_checkpoint(file, read_checkpoint(folder))

    def made(checkpoint: Path) -> list[Any]:
        made_of, place = tmp_path / "made" / checkpoint.suffix, ["--checkpoint-dir", str(tmp_path)]
        commands = [
            ["eval", checkpoint.name, *place, "--json"],  # found by its name
            ["generate", "time", "--checkpoint", str(checkpoint), "--max-new-tokens", "5", "--seed", "3"],
            ["checkpoints", "show", f"{checkpoint}{'/' * checkpoint.is_dir()}", "--json"],  # as Tab leaves it
            ["checkpoints", "verify", str(checkpoint), "--json"],
            ["checkpoints", "export", str(checkpoint), "--to", str(made_of / "export")],
        ]
        if kind in ("transformer", "state_space"):
            gguf = str(made_of / "model.gguf")
            commands.append(["checkpoints", "export", str(checkpoint), "--format", "gguf", "--to", gguf])
        said = [whole(ground.server.run(command)).stdout for command in commands]
        logits = nanothink.load(checkpoint).logits(torch.tensor([[5, 6, 7]]))
        written = {path.name: path.read_bytes() for path in made_of.rglob("*") if path.suffix in WEIGHTS}
        assert written
        scores = json.loads(said[0])["checkpoints"][0]["domains"]
        return [scores, said[1], json.loads(said[2])["step"], logits.tolist(), written]

    assert made(folder) == made(file)
    file.unlink()
    for command in (["eval", "code"], ["generate", "x", "--checkpoint", "code"]):
        missing = ground.server.run([*command, "--checkpoint-dir", str(tmp_path)])
        assert f"{tmp_path} holds {folder.name}" in " ".join(missing.stderr.split()), "what could be meant"
    part = ground.server.run(["eval", str(folder / "state.pt")])
    assert f"Give all of it: {folder}" in " ".join(part.stderr.split())


def test_a_folder_is_offered_found_by_name_and_set_aside_as_a_file_is(ground: Ground, tmp_path: Path) -> None:
    """All that there is of a run of two processes that was stopped before its first validation."""
    typed, store = ground.typed("transformer", tmp_path), CheckpointStore(tmp_path, stem("transformer"))
    ended = ground.server.run(typed, strike=after_step(2, "SIGINT"), processes=2)
    assert set(ended.codes) == {130}, ended.stderr
    (first,) = store.rolling()
    for command in (["eval"], ["generate", "x"]):
        refused = ground.server.run([*command, "--checkpoint-dir", str(tmp_path)])
        assert refused.code == 1
        assert f"nanothink resume {first}" in " ".join(refused.stderr.split())

    place = ["--checkpoint-dir", str(tmp_path)]
    ended = ground.server.run(["resume", "transformer", *place], strike=after_step(3, "SIGINT"))
    assert f"Resuming from {first}" in ended.stderr
    assert store.rolling() == [store.interrupted], "one process writes a file"

    aside = tmp_path / "replaced"
    for n_processes in (2, 1):
        (before,) = store.rolling()
        done = read_checkpoint(before)["step"]
        strike = after_step(1, "SIGINT")
        ended = ground.server.run([*typed, "--overwrite"], strike=strike, processes=n_processes)
        assert set(ended.codes) == {130}, ended.stderr
        (kept,) = aside.glob(f"*/{before.name}")
        assert read_checkpoint(kept)["step"] == done
        assert [read_checkpoint(path)["step"] for path in store.rolling()] == [1]
    ended = ground.server.run(["resume", str(kept)], strike=after_step(2, "SIGINT"))
    assert f"Resuming from {kept}" in ended.stderr, "a folder that was set aside can be trained further"
