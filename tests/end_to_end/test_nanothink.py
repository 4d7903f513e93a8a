"""NanoThink as a person uses it: refused or trained over experts, gone on with, used by itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combined_runs import KINDS, N_STEPS, PHASE, STEM, pretrain
from struck_runs import assert_same, metrics
from tiny import settings

import nanothink as package
from nanothink.checkpoints.file import read_checkpoint, write_checkpoint
from nanothink.cli.app import run
from nanothink.errors import UsageError
from nanothink.models.nanothink import NanoThink
from nanothink.runs.experts import find_experts
from nanothink.runs.saved_model import MAX_EXPERTS


def expert_options(folder: Path, *names: str) -> list[str]:
    return [part for name in names or KINDS for part in ("--expert", str(folder / f"{name}_expert.pt"))]


@pytest.fixture(scope="module")
def typed(tiny_corpus: Path, experts: Path) -> Callable[..., list[str]]:
    """What to type to train NanoThink into a folder, over the three experts elsewhere."""

    def command(folder: Path, *more: str | Path, **changed: Any) -> list[str]:
        values = PHASE | {name.replace("__", "."): value for name, value in changed.items()}
        spec = ("--data-dir", str(tiny_corpus), "--checkpoint-dir", str(folder), "--max-steps", str(N_STEPS))
        given = [] if "--expert" in more else expert_options(experts)
        return ["train-mla", *spec, *given, *settings(values), *map(str, more)]

    return command


@pytest.fixture(scope="module")
def trained(typed: Callable[..., list[str]], experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted. Its experts are the same to the byte afterwards."""
    folder = tmp_path_factory.mktemp("nanothink")
    before = {path.name: path.read_bytes() for path in experts.glob("*.pt")}
    assert run(typed(folder)) == 0
    assert {path.name: path.read_bytes() for path in experts.glob("*.pt")} == before
    return folder


# ---------------------------------------------------------------------------------------------------
# Training


def test_training_lowers_the_loss_below_the_ensemble_and_shows_the_routing(trained: Path) -> None:
    entries = metrics(trained, STEM)
    steps = [entry for entry in entries if entry["event"] == "train"]
    assert len(steps) == N_STEPS
    for entry in steps:
        weights = [entry[f"weight_{kind}"] for kind in KINDS]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
        lacking = math.log(3) - entry["routing_entropy"]
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.01 * lacking, rel=1e-5)
    assert steps[0]["routing_entropy"] == pytest.approx(math.log(3), rel=1e-5)
    assert steps[-1]["routing_entropy"] < math.log(3) - 1e-5
    validations = [entry for entry in entries if entry["event"] == "validation"]
    for entry in validations:
        assert entry["routing"].keys() == {"letters", "manuals", "tales"}
        for domain in entry["routing"].values():
            assert sum(domain["weights"].values()) == pytest.approx(1, abs=1e-6)
            assert 0 < domain["entropy"] <= math.log(3) + 1e-6
    assert validations[-1]["loss"] < validations[0]["loss"] < steps[0]["cross_entropy"]


def test_experts_are_bit_equal_inside_and_stay_out_of_the_optimizer(trained: Path, experts: Path) -> None:
    payload = read_checkpoint(trained / f"{STEM}.pt")
    for i, kind in enumerate(KINDS):
        prefix = f"experts.{i}."
        inside = {
            n.removeprefix(prefix): t for n, t in payload["model_state"].items() if n.startswith(prefix)
        }
        own = read_checkpoint(experts / f"{kind}_expert.pt")["model_state"]
        assert_same(inside, {n: t for n, t in own.items() if not n.startswith("joint_gate.")})
    optimized = {
        name
        for state in payload["optimizer_state"].values()
        for group in state["param_groups"]
        for name in group["names"]
    }
    frozen = ("experts.", "joint_gate.")
    assert optimized == {name for name in payload["model_state"] if not name.startswith(frozen)}


def test_going_on_needs_no_expert_and_takes_no_other(
    trained: Path, experts: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained / f"{STEM}.pt", tmp_path)
    path = tmp_path / f"{STEM}.pt"
    step = read_checkpoint(path)["step"]
    spec = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path)]
    assert run(["train-mla", *spec, "--resume", str(path), "--max-steps", str(step + 2)]) == 0
    capsys.readouterr()
    others = expert_options(experts, "state_space", "transformer")
    assert run(["train-mla", *spec, *others, "--resume", str(path), "--max-steps", str(step + 4)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "carries its own experts (transformer, state_space, diffuser)" in said
    assert run(["resume", str(path), "--max-steps", str(step + 4)]) == 0


def test_dry_run_counts_what_is_trained_and_what_is_frozen(
    typed: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(typed(tmp_path, "--dry-run", "--json")) == 0
    estimate = json.loads(capsys.readouterr().out)
    saved = read_checkpoint(trained / f"{STEM}.pt")["model_state"]
    state = {name: tensor for name, tensor in saved.items() if not name.startswith("joint_gate.")}
    frozen = sum(t.numel() for n, t in state.items() if n.startswith("experts."))
    assert estimate["frozen_parameters"] == frozen
    assert sum(estimate["parameters"].values()) == sum(t.numel() for t in state.values()) - frozen
    assert estimate["tokens_per_step"] == 4 * 2 * 32
    assert estimate["checkpoint_bytes"] == pytest.approx((trained / f"{STEM}.pt").stat().st_size, rel=0.1)
    assert run(typed(tmp_path, "--preset", "tiny", "--dry-run", "--json")) == 0  # its width gives way
    assert json.loads(capsys.readouterr().out)["tokens_per_step"] == 4 * 2 * 32
    assert not list(tmp_path.glob("*.pt"))


# ---------------------------------------------------------------------------------------------------
# Which experts


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    capsys.readouterr()
    assert run(arguments) == code
    return " ".join(capsys.readouterr().err.split())


def test_missing_experts_are_refused_with_the_commands_to_run(
    tiny_corpus: Path, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(experts / "state_space_expert.pt", tmp_path)
    spec = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path)]
    said = refused(capsys, ["train-mla", *spec])
    assert f"{tmp_path / 'transformer_expert.pt'} and {tmp_path / 'diffuser_expert.pt'} are not there" in said
    assert f"`nanothink pretrain transformer --data-dir {tiny_corpus} --checkpoint-dir {tmp_path}`" in said
    assert f"`nanothink pretrain diffuser --data-dir {tiny_corpus} --checkpoint-dir {tmp_path}`" in said
    assert "pretrain state_space" not in said
    said = refused(capsys, ["train-mla", *spec, "--expert", str(tmp_path / "code_expert.pt")])
    assert "code_expert.pt is not there" in said
    assert "nanothink pretrain transformer --name code" in said
    twice = expert_options(tmp_path, "state_space", "state_space")
    assert "twice" in refused(capsys, ["train-mla", *spec, *twice], code=2)
    assert not (tmp_path / f"{STEM}_interrupted.pt").exists()


def test_experts_that_do_not_fit_are_refused_by_name(
    typed: Callable[..., list[str]],
    trained: Path,
    experts: Path,
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = str(experts / "transformer_expert.pt")
    other = tmp_path / "tokenizer"
    assert (
        run(
            ["tokenizer", "train", "--data-dir", str(tiny_corpus), "--vocab-size", "280", "--out", str(other)]
        )
        == 0
    )
    pretrain(tiny_corpus, other, tmp_path, "transformer", "--name", "foreign")
    target = tmp_path / "nowhere"
    for expert, words in {
        tmp_path / "foreign_expert.pt": "foreign_expert.pt was trained with the tokenizer",
        trained / f"{STEM}.pt": f"{STEM}.pt holds a nanothink_mla, which is no expert",
    }.items():
        said = refused(capsys, typed(target, "--expert", good, "--expert", expert))
        assert words in said
    said = refused(capsys, typed(target, "--tokenizer", other))
    assert "Leave --tokenizer out: the transformer's own is used" in said
    for changed, words in (
        ({"model__d_model": 48}, "transformer_expert.pt has width 32, and model.d_model=48 was asked for"),
        ({"model__max_seq_len": 64}, "has a context of 32 tokens, and model.max_seq_len=64"),
        ({"mla__n_experts": 2}, "mla.n_experts=2 was asked for, not 3 experts"),
    ):
        assert words in refused(capsys, typed(target, **changed))
    assert "nanothink train-mla" in refused(capsys, ["pretrain", "nanothink_mla"], code=2)
    assert not list(target.glob("*.pt"))


def test_any_number_of_experts_of_any_kind_by_name(
    typed: Callable[..., list[str]], experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tales", "manuals"):
        shutil.copy(experts / "transformer_expert.pt", tmp_path / f"{name}_expert.pt")
    shutil.copy(experts / "state_space_expert.pt", tmp_path / "tales.pt")
    shutil.copy(experts / "state_space_expert.pt", tmp_path / "letters_expert_epoch3.pt")
    chosen = ["tales_expert.pt", "manuals_expert.pt", "tales.pt", "letters_expert_epoch3.pt"]
    given = [part for file in chosen for part in ("--expert", tmp_path / file)]
    more = ("--name", "mine", "--max-steps", "2", *given)
    assert run(typed(tmp_path, *more, model__max_seq_len=16)) == 0
    model = package.load(tmp_path / f"mine_{STEM}.pt")
    assert isinstance(model.model, NanoThink)
    assert model.model.names == ("tales", "manuals", "tales-2", "letters")
    assert (model.config.mla.n_experts, model.config.model.max_seq_len) == (4, 16)
    assert run(["resume", str(tmp_path / f"mine_{STEM}.pt"), "--max-steps", "3"]) == 0
    assert run([*typed(tmp_path, *more), "--resume"]) == 0


# ---------------------------------------------------------------------------------------------------
# Using it, by itself


@pytest.fixture
def alone(trained: Path, tmp_path: Path) -> Path:
    """Its checkpoint in a folder of its own."""
    return Path(shutil.copy(trained / f"{STEM}.pt", tmp_path))


def test_a_scan_that_is_not_here_gives_way_inside_too(alone: Path) -> None:
    payload = read_checkpoint(alone)
    for entry in payload["run"]["experts"]:
        entry["config"]["state_space"]["scan"] = "triton"
    foreign = alone.with_name("foreign.pt")
    write_checkpoint(foreign, payload)
    x = torch.arange(20).view(2, 10)
    torch.testing.assert_close(
        package.load(foreign, device="cpu").logits(x), package.load(alone).logits(x), rtol=1e-4, atol=1e-4
    )


def test_it_is_loaded_and_scored_by_itself(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.load(alone)
    assert (model.kind, model.notes) == (STEM, ())
    x = torch.tensor([model.tokenizer.encode("time light stone water")] * 2)
    weights = model.routing(x)
    assert weights.shape == (*x.shape, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(x.shape))
    assert model.logits(x).shape == (*x.shape, model.tokenizer.vocab_size)
    with pytest.raises(UsageError, match="token ids must lie in"):
        model.routing(x + 10_000)
    assert run(["eval", str(alone), "--split", "all", "--allow-seen", "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert scored["routing"].keys() == scored["domains"].keys()
    for domain in scored["routing"].values():
        assert sum(domain["weights"].values()) == pytest.approx(1, abs=1e-6)
    assert run(["eval", str(alone)]) == 0
    shown = capsys.readouterr().out
    assert "weight of the experts" in shown
    assert "entropy" in shown


def test_more_experts_than_can_be_opened_again_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}_expert.pt" for i in range(MAX_EXPERTS + 1)]
    with pytest.raises(UsageError, match="names 65 checkpoints; at most 64"):
        find_experts(paths, tmp_path)


def test_an_expert_routes_nothing(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experts / "transformer_expert.pt"
    with pytest.raises(UsageError, match="only a model that combines experts"):
        package.load(path).routing(torch.zeros(1, 1, dtype=torch.int64))
    assert run(["generate", "x", "--show-routing", "-c", str(path)]) == 2
    assert run(["generate", "x", "--show-routing", "--ddim", "-c", str(path)]) == 2


def test_routing_is_shown_token_by_token(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.load(alone)
    prompt = "time light"
    told = ["-c", str(alone), "-n", "50", "--seed", "3", "--ignore-eos", "--show-routing"]
    capsys.readouterr()
    assert run(["generate", prompt, *told, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    plain = model.generate(prompt, max_new_tokens=50, seed=3, stop_at_eos=False)
    assert sample["text"] == plain == "".join(token["text"] for token in sample["tokens"])
    # The weights of the parallel pass, up to where the context (32 tokens) is full.
    x = torch.tensor([[*model.tokenizer.encode(prompt), *(t["token"] for t in sample["tokens"])]])
    first, context = len(model.tokenizer.encode(prompt)), 32
    routing = model.routing(x[:, :context])[0, first - 1 :]
    for token, weights in zip(sample["tokens"], routing, strict=False):
        assert list(token["weights"].values()) == pytest.approx(weights.tolist(), abs=1e-5)
        assert token["expert"] == max(token["weights"], key=token["weights"].get)
    assert run(["generate", prompt, *told]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["token", "expert", *KINDS]
    assert "".join(json.loads(line.split("\t")[0]) for line in lines[1:]) == plain
    assert "\x1b" not in "".join(lines)
