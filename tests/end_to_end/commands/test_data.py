"""Bad lines, domains and counts of a corpus, as the commands tell of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import SMALL, Said, as_json

from nanothink.cli.app import run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pretrain", "transfomer"], 2, "Did you mean 'transformer'?"),
        (["pretrain", "transformer", "--data-dir", "nowhere"], 1, "nowhere"),
        (["pretrain", "transformer", "--preset", "tinny"], 2, "Did you mean 'tiny'?"),
        (["pretrain", "transformer", "--set", "train_expert.lrr=1"], 2, "Did you mean 'train_expert.lr'?"),
        (["pretrian", "transformer"], 2, "Did you mean 'pretrain'"),
        (["resume"], 1, "There is no checkpoint in"),
        (["resume", "no.pt"], 1, "no.pt"),
        (["eval"], 1, "nanothink pretrain"),
        (["eval", "--split", "vall"], 2, "Did you mean 'val'?"),
        (["generate", "x"], 1, "nanothink pretrain"),
        (["checkpoints", "show", "no.pt"], 1, "no.pt"),
        (["data", "validate", "nowhere"], 1, "nowhere"),
        (["config", "show", "modle"], 2, "Did you mean 'model'?"),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[str], code: int, words: str, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    errors = said()[1]
    assert words in errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors


def test_misspelt_domains_are_named(pretrain: Callable[..., int], said: Said, tmp_path: Path) -> None:
    assert pretrain(tmp_path, "--domains", "leters") == 2
    assert "Did you mean 'letters'?" in said()[1]


def test_bad_records_stop_training_unless_skipped(
    pretrain: Callable[..., int], tiny_corpus: Path, said: Said, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data, ignore=shutil.ignore_patterns(".nanothink"))
    with (data / "tales" / "texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": NaN}\n')
    assert pretrain(tmp_path / "a", "--max-steps", "2", data=data) == 1
    errors = said()[1]
    assert "texts.jsonl:21:" in errors
    assert "--skip-bad-records" in errors
    assert pretrain(tmp_path / "a", "--max-steps", "2", "--skip-bad-records", data=data) == 0
    assert "2 bad records left out" in said()[1]

    assert run(["data", "validate", str(data), "--json"]) == 1
    report = as_json(said)
    assert report["ok"] is False
    assert (report["n_files"], report["n_records"]) == (3, 110)
    assert [(e["line"], sorted(e)) for e in report["errors"]] == [
        (21, ["column", "file", "line", "reason"]),
        (22, ["column", "file", "line", "reason"]),
    ]


def test_every_command_says_which_bad_lines_it_left_out(
    tiny_corpus: Path, tiny_tokenizer: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_corpus, "data", ignore=shutil.ignore_patterns(".nanothink"))
    with Path("data/tales/texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n' * 3 + '{"text": NaN}\n')
    tokens, skip = ["--tokenizer", str(tiny_tokenizer)], "--skip-bad-records"
    train = ["pretrain", "transformer", *SMALL, *tokens, skip, "--max-steps", "2", "--json"]
    expert = "checkpoints/transformer_expert.pt"
    counts = {"`text` is empty; a record needs some text": 3}
    for command in (
        ["data", "inspect", *tokens, skip, "--json"],
        ["tokenizer", "train", "--json"],
        [*train, "--dry-run"],
        train,
        ["resume", expert, "--max-steps", "3", "--json"],
        ["eval", "--json"],
        ["eval", expert, expert, "--split", "all", "--allow-seen", "--json"],
        ["store", "build", "--expert", expert, "--dry-run", "--json"],
        ["store", "build", "--expert", expert, "--json"],
    ):
        assert run(command) == 0, command
        out, notes = said()
        found = json.loads(out)
        assert found["n_bad_lines"] == 4, command
        if "bad_lines" in found:
            groups = {group["reason"]: group["n_problems"] for group in found["bad_lines"]}
            assert len(groups) == 2
            assert groups.items() >= counts.items()
        (line,) = [line for line in notes.splitlines() if line.startswith("Left out: ")]
        assert line.startswith("Left out: 4 bad lines of ")
        assert "data/tales/texts.jsonl:21:10" in line
        assert "`text` is empty; a record needs some text (3, the first at " in line
        assert "(--skip-bad-records)" in notes or "pretrain" not in command or "--dry-run" in command
    assert run(["report", "--json"]) == 0
    assert "4 bad lines of the data left out" in Path(json.loads(said()[0])["report"]).read_text("utf-8")

    Path("rows.jsonl").write_text('{"text": "a"}\n' + "nonsense\n" * 30)
    assert run(["data", "import", "rows.jsonl", "--domain", "rows", "--json"]) == 1
    report = as_json(said)
    assert (report["n_records"], report["n_bad_rows"], len(report["bad_rows"])) == (1, 30, 20)
    assert report["bad_row_groups"][0]["lines"] == [["rows.jsonl", 2, 31]]
    assert run(["data", "import", "rows.jsonl", "--domain", "rows", "--overwrite"]) == 1
    errors = said()[1].splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: rows.jsonl:2:1: not JSON: expecting value, found `nonsense`")
    assert errors[0].endswith("(30 times: rows.jsonl: 2-31)")
    assert errors[1] == "warning: 30 rows left out, as said above."


def test_bad_lines_are_grouped_or_all_named(said: Said, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    odd = '{"text": "\\u00e9"}\n{"text": "b"}\n'
    (tmp_path / "a" / "x.jsonl").write_text(
        odd + '{"text": ""}\n' * 300 + "{a: 1}\n{b: 2}\n" * 15 + odd + "[1]\n"
    )
    assert run(["data", "validate", str(tmp_path)]) == 1
    told = [line for line in said()[0].splitlines() if line.startswith("error: ")]
    where = f"error: {tmp_path}/a/x.jsonl"
    assert told[0] == (
        f"{where}:3:10: `text` is empty; a record needs some text (300 times: {tmp_path}/a/x.jsonl: 3-302)"
    )
    assert told[1].startswith(
        f"{where}:303:2: not JSON: expecting property name enclosed in double quotes, found `a`"
    )
    assert told[21].startswith(f"{where}:303:2: 10 more like this: ")
    assert told[22].startswith(f"{where}:335:1: a record must be a JSON object, not an array")
    assert len(told) == 23
    assert run(["data", "validate", str(tmp_path), "--all"]) == 1
    lines = said()[0].splitlines()
    named = [int(line.split(":")[2]) for line in lines if line.startswith("error: ")]
    assert named == [*range(3, 333), 335]
    assert lines[-1].startswith("4 records in 1 file: 331 errors.")

    assert run(["data", "validate", str(tmp_path), "--json"]) == 1
    report = as_json(said)
    assert (report["n_errors"], len(report["errors"])) == (331, 20 + 20 + 1)
    assert [group["n_problems"] for group in report["error_groups"]] == [300, 30, 1]
    assert report["error_groups"][0]["lines"] == [[f"{tmp_path}/a/x.jsonl", 3, 302]]
    assert run(["data", "validate", str(tmp_path), "--json", "--all"]) == 1
    every = as_json(said)
    assert [error["line"] for error in every["errors"]] == named
    assert every.keys() == report.keys()
    (tmp_path / "a" / "x.jsonl").write_text(odd)
    assert run(["data", "validate", str(tmp_path), "--json", "--all"]) == 0
    assert as_json(said)["errors"] == []


def test_the_corpus_in_numbers(tiny_corpus: Path, tiny_tokenizer: Path, said: Said) -> None:
    command = ["data", "inspect", str(tiny_corpus), "--tokenizer", str(tiny_tokenizer)]
    assert run([*command, "--json"]) == 0
    summary = as_json(said)
    letters = summary["domains"]["letters"]
    assert (letters["n_files"], letters["n_records"], letters["n_duplicates"]) == (1, 60, 0)
    assert letters["n_train_tokens"] + letters["n_val_tokens"] == letters["n_tokens"]
    assert sum(summary["record_lengths"]["counts"]) == summary["total"]["n_records"] == 110
    assert run(command) == 0
    shown = said()[0]
    assert "letters" in shown
    assert "  test  " not in shown


def test_the_corpus_in_numbers_with_a_test_side_and_near_duplicates(
    tiny_corpus: Path, tiny_tokenizer: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasketch")
    shutil.copytree(tiny_corpus, tmp_path / "data")
    near = tmp_path / "data" / "letters" / "again.jsonl"
    near.write_text((tiny_corpus / "letters" / "texts.jsonl").read_text().replace('."', '. The end."'))
    (tmp_path / "data" / "one").mkdir()
    (tmp_path / "data" / "one" / "a.jsonl").write_text('{"text": "A single text of some words."}\n')
    monkeypatch.chdir(tmp_path)  # settings of training hold here too: of a file, and by hand
    (tmp_path / "nanothink.toml").write_text(f"[data]\ntokenizer = '{tiny_tokenizer}'\ntest_split = 0.3\n")
    command = ["data", "inspect", "--near-duplicates"]
    assert run([*command, "--json"]) == 0
    summary = as_json(said)
    letters, one = summary["domains"]["letters"], summary["domains"]["one"]
    assert letters["n_tokens"] == sum(letters[f"n_{side}_tokens"] for side in ("train", "val", "test"))
    assert 0.15 < letters["n_test_tokens"] / letters["n_tokens"] < 0.45
    assert (one["n_records"], summary["total"]["n_records"]) == (1, 171)
    assert sum(summary["record_lengths"]["counts"]) == 171
    found = summary["near_duplicates"]
    assert (found["n_documents"], found["n_near_duplicates"]) == (171, 120)
    assert found["n_val"] >= found["n_val_in_training"] > 0
    assert run(command) == 0
    shown = " ".join(said()[0].split())
    assert "validation test blocks" in shown
    assert "120 of 171 texts have one" in shown
    assert f"{found['n_test_in_training']} of {found['n_test']} test texts have one in training" in shown
    assert "data/letters/again.jsonl:" in shown
    assert run(["data", "inspect", "--set", "data.test_split=0", "--json"]) == 0
    assert as_json(said)["total"]["n_test_tokens"] == 0
    assert run(["data", "inspect", "--set", "data.test_split=0.95"]) == 2
    assert "leave nothing to train on" in said()[1]
