"""``nanothink train``: the commands it runs, in what order, and where it continues."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanothink.cli.app import run
from nanothink.cli.story import Story
from nanothink.data.tokenizer import load_tokenizer
from nanothink.errors import CheckpointMismatchError, NanoThinkError, StorageError, UsageError
from nanothink.runs.plan_sizes import Shape, StepTime, TextSize
from nanothink.runs.planning import PlanFile
from nanothink.training.regularisation import Regularisation


class Commands:
    """Stands for the program: keeps each command and leaves its checkpoint, or fails at one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.called: list[list[str]] = []
        self.fails_at: str | None = None

    def __call__(self, words: list[str]) -> int:
        self.called.append(words)
        kind = words[1] if words[0] == "pretrain" else words[0]
        stem = {"pretrain": f"{kind}_expert", "train-mla": "nanothink_mla"}.get(words[0])
        if stem:
            (self.folder / f"{stem}.pt").write_bytes(b"")
        return 130 if kind == self.fails_at else 0

    @property
    def names(self) -> list[str]:
        return [words[1] if words[0] == "pretrain" else words[0] for words in self.called]


@pytest.fixture(autouse=True)
def _short_measurements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no test asks how right they are, a plan's speeds are those of a moment."""
    if "bench" not in request.keywords:
        monkeypatch.setattr("nanothink.runs.machine_speed._LEAST_SECONDS", 0.01)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path / "models")


@pytest.fixture
def text(tiny_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / "text"))


ALL = ["tokenizer", "state_space", "transformer", "train-mla", "eval", "generate"]


def speed_of(kind: str, shape: Shape, vocab_size: int) -> StepTime:
    return StepTime(step_seconds=0.05, token_seconds=1e-5)


def story(commands: Callable[[list[str]], int], folder: Path, text: Path, **more: Any) -> Story:
    """A story of two experts, which ``kinds=None`` lets have further ones: here no command takes any time."""
    asked: dict[str, Any] = {
        "seconds": 120,
        "speed_of": speed_of,
        "kinds": ("state_space", "transformer"),
    } | more
    return Story(commands, folder, str(text), **asked)


def test_it_runs_each_stage_once_and_scores_again_when_asked_again(commands: Commands, text: Path) -> None:
    assert story(commands, commands.folder, text).tell() == 0
    assert commands.names == ALL
    commands.called.clear()
    assert story(commands, commands.folder, text, seconds=None).tell() == 0
    assert commands.names == ["eval", "generate"]


def test_it_continues_where_it_was_interrupted_with_the_same_commands(commands: Commands, text: Path) -> None:
    commands.fails_at = "transformer"
    assert story(commands, commands.folder, text).tell() == 130
    assert commands.names == ALL[:3]
    interrupted = commands.called[-1]
    commands.fails_at = None
    commands.called.clear()
    assert story(commands, commands.folder, text).tell() == 0
    assert commands.names == ALL[2:]
    assert commands.called[0] == interrupted
    assert "--resume" in interrupted


def test_a_killed_one_continues_with_the_stage_that_it_was_in(commands: Commands, text: Path) -> None:
    def killed(words: list[str]) -> int:
        commands(words)
        if words[0] == "pretrain":
            # kill -9 leaves the plan as it was before the stage
            kept.append(PlanFile(commands.folder).path.read_bytes())
            raise KeyboardInterrupt
        return 0

    kept: list[bytes] = []
    with pytest.raises(KeyboardInterrupt):
        story(killed, commands.folder, text).tell()
    PlanFile(commands.folder).path.write_bytes(kept[0])
    before = commands.called[-1]
    commands.called.clear()
    assert story(commands, commands.folder, text).tell() == 0
    assert commands.names == ALL[1:]
    assert commands.called[0] == before


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"seconds": 130}, UsageError, "To continue it: `nanothink train"),
        ({"kinds": ("transformer",)}, UsageError, "To continue it: `nanothink train"),
        ({"text": "more"}, CheckpointMismatchError, "To train on the text as it is now: `--overwrite`"),
    ],
)
def test_another_plan_or_text_is_refused_and_can_be_started_anew(
    commands: Commands, text: Path, change: dict[str, Any], error: type[NanoThinkError], says: str
) -> None:
    commands.fails_at = "transformer"
    assert story(commands, commands.folder, text).tell() == 130
    if change.pop("text", None):
        with (text / "letters" / "texts.jsonl").open("a") as file:
            file.write('{"text": "One more."}\n')
    with pytest.raises(error, match=says):
        story(commands, commands.folder, text, **change).tell()
    for path in commands.folder.glob("*.pt"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    commands.fails_at = None
    commands.called.clear()
    assert story(commands, commands.folder, text, overwrite=True, **change).tell() == 0
    trained = [words for words in commands.called if words[0] == "pretrain"]
    old = {"state_space", "transformer"}
    assert all(("--overwrite" in words) == (words[1] in old) for words in trained)


def test_time_that_the_experts_do_not_need_goes_to_further_ones(commands: Commands, text: Path) -> None:
    assert story(commands, commands.folder, text, seconds=600, kinds=None).tell() == 0
    trained = [words for words in commands.called if words[0] == "pretrain"]
    names = [words[words.index("--name") + 1] if "--name" in words else words[1] for words in trained]
    assert names[:2] == ["state_space", "transformer"]
    assert len(names) == len(set(names)) > 2
    (combined,) = (words for words in commands.called if words[0] == "train-mla")
    paths = [Path(combined[i + 1]).name for i, word in enumerate(combined) if word == "--expert"]
    assert paths == [f"{name}_expert.pt" for name in names]
    assert all("--seed" in words for words in trained[2:])
    assert "vector_store.expert=state_space_2" in combined, "the widest"


def test_a_machine_that_was_busy_when_the_plan_was_made_brings_further_experts_later(
    commands: Commands, text: Path
) -> None:
    def speed(kind: str, shape: Shape, vocab_size: int) -> StepTime:
        busy = 1 if commands.called else 10
        return StepTime(step_seconds=0.05 * busy, token_seconds=1e-5 * busy)

    planned = story(commands, commands.folder, text, seconds=600, kinds=None, speed_of=speed)._plan()
    assert [stage.title for stage in planned.experts] == ["state_space", "transformer"]
    assert story(commands, commands.folder, text, seconds=600, kinds=None, speed_of=speed).tell() == 0
    assert commands.names[:3] == ALL[:3]
    assert commands.names[3] == "state_space"
    assert commands.names[-3:] == ALL[-3:]
    assert story(commands, commands.folder, text, seconds=None, kinds=None, speed_of=speed).tell() == 0
    assert commands.names[-2:] == ["eval", "generate"], "and no more when asked again"
    assert sum(name == "train-mla" for name in commands.names) == 1


def test_epochs_are_counted_in_the_tokens_of_the_trained_tokenizer(tmp_path: Path) -> None:
    easy = "".join(f"This is line {i} of a text that is easy to compress. " for i in range(40))
    (tmp_path / "text" / "easy").mkdir(parents=True)
    lines = (json.dumps({"text": f"{n} {easy}"}) + "\n" for n in range(60))
    (tmp_path / "text" / "easy" / "a.jsonl").write_text("".join(lines))

    def call(words: list[str]) -> int:
        return run(words) if words[0] == "tokenizer" else 0

    story(call, tmp_path / "models", tmp_path / "text", seconds=36_000).tell()
    plan = PlanFile(tmp_path / "models").read()
    assert plan is not None
    tokenizer = load_tokenizer(str(tmp_path / "models" / "tokenizer"))
    n_tokens = 60 * len(tokenizer.encode(f"1 {easy}"))
    assert n_tokens < 0.8 * TextSize(n_bytes=plan.text.n_bytes, n_domains=1).n_tokens(plan.vocab_size)
    for stage in plan.experts:
        most = Regularisation.of(int(0.9 * n_tokens), plan.shape_of(stage).n_parameters(plan.vocab_size))
        assert stage.steps == pytest.approx(
            most.max_epochs * 0.9 * n_tokens / plan.shape.tokens_per_step, rel=0.05
        )


def test_a_place_that_cannot_be_written_is_an_error(commands: Commands, text: Path) -> None:
    with pytest.raises(StorageError, match=r"Cannot write /proc/models/plan\.json"):
        story(commands, Path("/proc/models"), text).tell()
    assert not commands.called


def test_models_that_no_plan_has_made_are_kept(commands: Commands, text: Path) -> None:
    commands.folder.mkdir()
    (commands.folder / "transformer_expert.pt").write_bytes(b"mine")
    with pytest.raises(UsageError, match="no plan has made it"):
        story(commands, commands.folder, text).tell()
    assert not commands.called


@pytest.mark.parametrize("place", ["novels", "novels/old/a.md", "pages"])
def test_documents_are_imported_first(commands: Commands, tmp_path: Path, place: str) -> None:
    (tmp_path / "novels" / "old").mkdir(parents=True)
    (tmp_path / "novels" / "old" / "a.md").write_text("It was late. " * 3000)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text("<p>It was late.</p><!-- no text -->" * 3000)
    assert story(commands, commands.folder, tmp_path / place).tell() == 0
    assert commands.names == ["data", *ALL]
    imported = commands.called[0]
    assert imported[1:3] == ["import", str(tmp_path / place)]
    assert str(commands.folder / "data") in (commands.folder / "train.toml").read_text()
    plan = PlanFile(commands.folder).read()
    assert plan is not None
    assert plan.text.n_bytes == pytest.approx(len("It was late. ") * 3000, rel=0.2)  # of the text
    assert plan.prompt == "It was"


def test_documents_that_need_an_option_are_imported_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "briefe").mkdir()
    (tmp_path / "briefe" / "a.txt").write_bytes("Schöne Grüße aus München. ".encode("cp1252") * 100)
    models = ["--checkpoint-dir", str(tmp_path / "models")]
    assert run(["train", str(tmp_path / "briefe"), "--time", "1h", *models]) == 1
    suggested = re.search(r"`nanothink (data import .*?)`", capsys.readouterr().err)
    assert suggested
    assert run(shlex.split(suggested[1])) == 0
    assert run(["train", str(tmp_path / "briefe-imported"), "--time", "5h", *models, "--dry-run"]) == 0


def test_a_dry_run_writes_nothing(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(text), "--time", "10h", "--checkpoint-dir", str(tmp_path / "models"), "--dry-run"]
    assert run(words) == 0
    assert "state_space" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--time says how long"),
        (["--time", "1s"], "The least that makes sense is"),
        (["--time", "1h", "--experts", "mamba"], "there is no expert 'mamba'"),
        (["--time", "1h", "--experts", "diffuser"], "--experts transformer,diffuser"),
    ],
)
def test_what_cannot_be_planned_says_what_to_type(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert run(["train", str(text), "--checkpoint-dir", str(tmp_path / "models"), *words]) == 2
    assert says in capsys.readouterr().err


def test_the_command_that_continues_is_the_plans_whatever_was_asked_for(
    commands: Commands, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line completes suggestions by the options of the command that failed."""
    assert story(commands, commands.folder, text, seconds=630).tell() == 0
    capsys.readouterr()
    asked = ["--time", "5h", "--experts", "transformer", "--checkpoint-dir", str(commands.folder)]
    assert run(["train", str(text), *asked]) == 2
    suggested, anew = re.findall(r"`nanothink (train .*?)`", capsys.readouterr().err)
    assert shlex.split(anew) == ["train", str(text), "--overwrite", *asked]
    words = shlex.split(suggested)
    assert words[words.index("--time") + 1] == "630s"
    assert words[words.index("--experts") + 1] == "state_space,transformer"
    assert run([*words, "--dry-run"]) == 0


def test_a_changed_text_is_trained_on_by_the_command_that_is_suggested(
    commands: Commands, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert story(commands, commands.folder, text, seconds=36_000, kinds=("transformer",)).tell() == 0
    with (text / "letters" / "texts.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    capsys.readouterr()
    assert run(["train", str(text), "--checkpoint-dir", str(commands.folder)]) == 1
    (suggested,) = re.findall(r"`nanothink (train .*?)`", capsys.readouterr().err)
    assert "--experts transformer" in suggested
    assert run([*shlex.split(suggested), "--dry-run"]) == 0


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_four_minutes_on_the_starter_corpus_are_four_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In seconds of the processor, which other work changes least, but does."""
    # Of that module alone: an event loop in another thread would sleep for days by another clock.
    clock = SimpleNamespace(monotonic=time.process_time, time=time.time)
    monkeypatch.setattr("nanothink.cli.story.time", clock)
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    data = str(tmp_path / "data")
    assert run(["data", "sample", data]) == 0
    capsys.readouterr()
    began = time.process_time()
    assert run(["train", data, "--time", "4m", "--checkpoint-dir", str(tmp_path / "models"), "--json"]) == 0
    assert time.process_time() - began <= 1.25 * 240  # alone 1.1
    found = json.loads(capsys.readouterr().out)
    scores = {row["kind"]: row["overall"]["bits_per_byte"] for row in found["checkpoints"]}
    assert scores["nanothink_mla"] < min(scores["transformer"], scores["state_space"])
