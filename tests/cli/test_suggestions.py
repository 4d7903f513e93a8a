"""Every command that a message suggests works as it stands, in the situation that prints it."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import made_up_texts, write_domain
from forking_shell import quick

from nanothink.cli.app import command_tree, run
from nanothink.cli.suggestions import calling, completed
from nanothink.suggestions import again
from nanothink.training import loop

ROOT = Path(__file__).parents[2]

TRAIN = (
    "--data-dir texts --checkpoint-dir models --config small.toml --tokenizer tok --set train_mla.lr=0.001"
)
PLACE = "--checkpoint-dir models"
MODEL = "models/transformer_expert.pt"


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in quick(steps=2, max_keys=500).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder with text, a tokenizer and trained models, all where no command looks by default."""
    here = tmp_path_factory.mktemp("world")
    for seed, domain in enumerate(("letters", "tales")):
        write_domain(here / "texts" / domain, made_up_texts(seed, 30))
    shutil.copytree(tiny_tokenizer, here / "tok")
    (here / "small.toml").write_text("[train_expert]\nlr = 0.001\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, value in quick(steps=2, max_keys=500).items():
            patch.setenv(name, value)
        for kind in ("transformer", "state_space", "diffuser"):
            assert run(shlex.split(f"pretrain {kind} {TRAIN}")) == 0
        assert run(shlex.split(f"train-mla --use-vector-store {TRAIN}")) == 0
    return here


TRAINED_ONE, TRAINED_ALL = "a diffuser without its transformer", "NanoThink without experts"
SITUATIONS = {
    TRAINED_ONE: (
        "rm models/*.pt",
        f"pretrain diffuser {TRAIN}",
        "pretrain transformer",
    ),
    TRAINED_ALL: ("rm models/*.pt", f"train-mla {TRAIN}", "pretrain state_space"),
    "no model to score": ("rm models/*.pt", f"eval {PLACE}", "pretrain transformer"),
    "no model to combine": ("rm -r models/nano*", f"generate x --show-routing {PLACE}", "train-mla"),
    "no such checkpoint": ("rm models/*.pt", f"generate x -c models/a.pt {PLACE}", "pretrain transformer"),
    "no run to report": ("rm -r models", f"report {PLACE}", "pretrain transformer"),
    "nothing to resume": ("rm models/*.pt", f"resume {PLACE}", "pretrain transformer"),
    "another kind to resume": ("", f"pretrain state_space --resume {MODEL} {TRAIN}", f"resume {MODEL}"),
    "another width": (
        "",
        f"pretrain diffuser --name d {TRAIN} --set model.d_model=32",
        "pretrain transformer --name transformer_32",
    ),
    "a longer context": (
        "",
        f"pretrain diffuser --name d {TRAIN} --set model.max_seq_len=64 --set diffuser.target=hidden_state",
        "pretrain diffuser --set model.max_seq_len=32",
    ),
    "another kind to start from": (
        "",
        f"pretrain state_space --init {MODEL} --name s {TRAIN}",
        f"pretrain transformer --init {MODEL}",
    ),
    "no test side": ("", f"eval {MODEL} --split test {PLACE}", f"eval {MODEL} --split val"),
    "text that was seen": ("", f"eval {MODEL} --split train {PLACE}", f"eval {MODEL} --split val"),
    "a model without a store": (
        "rm -r models/nano*",
        f"store build -c {MODEL} {PLACE}",
        f"store build --expert {MODEL}",
    ),
    "a store that is gone": (
        "rm -r models/*.store",
        f"generate x {PLACE}",
        "store build -c models/nanothink_mla.pt",
    ),
    "a store that is there": ("", f"store build {PLACE}", "store info"),
    "text for a store": ("", f"store build {PLACE}", "store add --help"),
    "a damaged store": (
        "for file in models/*.store/tokens-*; do echo >> $file; done",
        f"store info {PLACE}",
        "store build -c models/nanothink_mla.pt --overwrite",
    ),
    "a damaged checkpoint": (f"echo >> {MODEL}", f"generate x -c {MODEL} {PLACE}", "checkpoints ls"),
    "NanoThink as an expert": ("rm -r models/nano*", f"pretrain nanothink_mla {TRAIN}", "train-mla"),
    "no data folder": ("", "data validate other", "data sample --data-dir other"),
    "a folder of documents": (
        "mkdir 'My Books' && for i in `seq 9`; do echo \"It was late. $i \" >> 'My Books/a.md'; done",
        "data validate 'My Books'",
        "data import 'My Books' --domain my_books --data-dir 'My Books-imported'",
    ),
    "a folder of tables": (
        "mkdir tables && printf 'text\n\"Good day.\"\n' > tables/'My Letters.csv'",
        "data validate tables",
        "data import 'tables/My Letters.csv' --domain my_letters --data-dir tables",
    ),
    "documents among tables": (
        "mkdir both && echo text > both/a.txt && printf 'text\n\"Good day.\"\n' > both/b.csv",
        "data import both --domain both",
        "data import 'both/**/*.csv' --domain both",
    ),
    "an empty data folder": ("mkdir empty", "data validate empty", "data sample --data-dir empty"),
    "a file for a folder": (
        "echo text > book.txt",
        "data validate book.txt",
        "data import book.txt --domain book",
    ),
    "a bad record": (
        "echo no >> texts/tales/texts.jsonl",
        f"pretrain transformer --name t {TRAIN}",
        "data validate",
    ),
    "a wrong setting": ("", f"pretrain transformer {TRAIN} --set train_expert.lrr=1", "config show"),
    "GGUF of NanoThink": (
        "",
        f"checkpoints export models/nanothink_mla.pt --to m.gguf --format gguf {PLACE}",
        "checkpoints export",
    ),
    "a passage to rebuild": (
        "",
        f"generate --denoise -c models/diffuser_expert.pt {PLACE}",
        "generate 'Some text' --denoise",
    ),
    "a run that is there": ("", f"pretrain transformer {TRAIN}", "pretrain transformer --overwrite"),
    "an export that is there": (
        "mkdir out && echo '{}' > out/config.json",
        f"checkpoints export {MODEL} --to out {PLACE}",
        f"checkpoints export {MODEL} --overwrite",
    ),
    "a tokenizer that is there": (
        "",
        "tokenizer train --data-dir texts --out tok --vocab-size 300",
        "tokenizer train --overwrite",
    ),
    "an import without a domain": (
        "echo text > 'My Book.txt'",
        "data import 'My Book.txt'",
        "data import 'My Book.txt' --domain my_book",
    ),
    "a column": (
        "printf 'id;subject;body\\n1;a;b\\n' > a.csv",
        "data import a.csv --domain a --data-dir b",
        "data import a.csv",
    ),
    "presets": ("", "config presets", "config presets tiny"),
}
"""What is broken, what is typed, and one of the commands that are suggested."""


@pytest.mark.parametrize("name", SITUATIONS)
def test_suggestions_work_as_they_stand(
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaking, typed, expected = SITUATIONS[name]
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr("nanothink.runs.machine_speed._LEAST_SECONDS", 0.01)
    subprocess.run(breaking, shell=True, check=True)
    if "--data-dir" not in typed and "data " not in typed:
        monkeypatch.setenv("NANOTHINK_DATA__DATA_DIR", "texts")
    capsys.readouterr()
    run(shlex.split(typed))
    printed = capsys.readouterr()
    suggested = re.findall(r"`nanothink ([^`]+)`|: nanothink (.+)$", printed.out + printed.err, re.M)
    calls = [quoted or bare for quoted, bare in suggested]
    assert any(call.startswith(expected) for call in calls), printed.err
    # Where a command that reads another folder stands, the data is found as the environment says.
    monkeypatch.setenv("NANOTHINK_DATA__TOKENIZER", "tok")
    for call in calls:
        words = shlex.split(call)
        # Two situations train; in the others it is enough that the training could begin. Imports
        # that are suggested write the same file.
        plans = words[0] == "pretrain" and name not in (TRAINED_ONE, TRAINED_ALL)
        plans |= words[0] == "train" or words[:2] == ["data", "import"]
        code = run([*words, "--dry-run"] if plans else words)
        assert code == (call.startswith("data validate")), (call, capsys.readouterr().err)


def test_a_suggestion_keeps_what_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_domain(tmp_path / "my texts" / "letters", ["One."])
    (tmp_path / "a.toml").write_text("")
    shared = (
        "--tokenizer tok --data-dir 'my texts' --domains letters --preset tiny --checkpoint-dir m "
        "--device cpu --config a.toml --set train_expert.lr=0.01 --set train_mla.lr=0.01"
    )
    run(shlex.split(f"pretrain diffuser --skip-bad-records --name mine --max-steps 3 --overwrite {shared}"))
    suggested = re.search("`nanothink pretrain transformer (.+?)`", capsys.readouterr().err)
    assert suggested
    given, kept = shlex.split(shared), shlex.split(suggested[1])
    assert sorted(kept) == sorted([*given, "--skip-bad-records"])


def test_a_model_that_a_message_names_is_not_one_of_the_call_too() -> None:
    tree = command_tree()
    root = tree.make_context("nanothink", [], resilient_parsing=True)
    words = ["--expert", "a.pt", "--checkpoint-dir", "m"]
    call = tree.commands["train-mla"].make_context("train-mla", words, parent=root, resilient_parsing=True)
    with calling(call):
        completing = completed("`nanothink store build -c m.pt`")
    assert completing == "`nanothink store build -c m.pt --checkpoint-dir m`"


def test_a_run_that_was_killed_before_its_first_validation_is_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    shutil.rmtree("models")

    def killed(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", killed)
        assert run(shlex.split(f"pretrain transformer {TRAIN}")) == 130
    capsys.readouterr()
    assert run(shlex.split(f"eval --data-dir texts {PLACE}")) == 1
    suggested = re.search("an interrupted run.*`nanothink (resume .+?)`", capsys.readouterr().err)
    assert suggested
    assert run(shlex.split(suggested[1])) == 0
    assert run(shlex.split(f"eval --data-dir texts {PLACE}")) == 0


@pytest.mark.parametrize("how", ["resume models/mine_expert.pt", "pretrain transformer --name mine --resume"])
def test_advice_to_a_resumed_run_is_the_command_that_began_it(
    how: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Preset, tokenizer and settings stand in the checkpoint, so they are not typed again."""
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(loop, "_advice", lambda run: f"Retry: {again('--max-epochs', 1, '--overwrite')}")
    assert run(shlex.split(f"pretrain transformer --name mine --domains letters {TRAIN}")) == 0
    capsys.readouterr()
    assert run(shlex.split(f"{how} --max-steps 3 --set train_expert.lr=0.002 {PLACE}")) == 0
    advice = re.search("Retry: `nanothink (.+?)`", capsys.readouterr().err)
    assert advice
    asked = f"pretrain transformer --name mine --domains letters {TRAIN}"
    asked += " --max-steps 3 --set train_expert.lr=0.002 --max-epochs 1 --overwrite"
    assert sorted(shlex.split(advice[1])) == sorted(asked.split())
    assert run(shlex.split(advice[1])) == 0, capsys.readouterr().err


def test_a_run_with_tensorboard_says_how_to_look(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    models = tmp_path / "my models"
    place = ["--checkpoint-dir", str(models), "--set", "train_expert.tracker=tensorboard"]
    assert run([*shlex.split(f"pretrain transformer {TRAIN}"), *place]) == 0
    said = re.search("To watch the run: tensorboard --logdir (.+)$", capsys.readouterr().err, re.M)
    assert said
    assert list(Path(*shlex.split(said[1])).rglob("events.out.tfevents.*"))


def test_where_there_is_no_text_it_is_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eval"]) == 1
    first_then = "`nanothink data sample --data-dir data && nanothink pretrain transformer`"
    assert first_then in capsys.readouterr().err


ELSEWHERE = {
    "checkpoints show": "of weights that hardly fit, which a run refuses earlier",
    "serve --port": "it would serve until it is stopped; of a port that is taken",
    "checkpoints prune": "of a disk that is full",
    "checkpoints verify": "of weights that are not finite",
    "tokenizer train": "of a tokenizer that loses text",
    "data import": "tests/data/test_importing.py types these",
    "generate Hello": "it needs a model with a chat template",
    "checkpoints import": "it needs a model of others",
    "report": "the demo's last words",
    "store search": "the demo's last words",
}


def test_every_suggestion_has_its_situation() -> None:
    """The rest are commands that another test types, or that need no option."""
    calls = set()
    for path in sorted((ROOT / "nanothink").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("suggest", "command") and isinstance(first, ast.Constant):
                    calls.add(str(first.value).partition(" --")[0])
    tried = [expected for _, _, expected in SITUATIONS.values()] + list(ELSEWHERE)
    assert {
        call for call in calls if not any(t.startswith(call) or call.startswith(t) for t in tried)
    } == set()


def test_commands_in_messages_come_from_one_place() -> None:
    """Commands typed into a string would miss the options of the command that failed."""
    names = "|".join(sorted(command_tree().commands))
    typed = re.compile(rf"\bnanothink (?:{names})\b|\bpip install\b")
    found = []
    for path in sorted((ROOT / "nanothink").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        skipped = {id(n) for node in ast.walk(tree) for n in _no_messages(node)}
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {node.value[:60]}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
            and typed.search(node.value)
            and path.name not in ("page.py", "exporting.py", "publishing.py")  # of files
        ]
    assert found == []


def _no_messages(node: ast.AST) -> list[ast.AST]:
    """Docstrings and help texts, which no situation prints."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return [node.value]
    if isinstance(node, ast.keyword) and node.arg == "help":
        return list(ast.walk(node.value))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("option", "flag", "argument"):
        return list(ast.walk(node))
    return []


def test_a_name_is_the_checkpoint_of_that_name(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    (here / "models").rename("checkpoints")
    for typed in (
        "eval diffuser --max-tokens 40 --data-dir texts",
        "generate x -n 2 -c nanothink_mla",
        "checkpoints show transformer",
        "checkpoints export state_space --to exported",
    ):
        assert run(shlex.split(typed)) == 0, capsys.readouterr().err
    assert run(["generate", "x", "-c", "nobody"]) == 1
