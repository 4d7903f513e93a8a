"""``nanothink report`` on runs that were really trained."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from nanothink.cli.app import run

SMALL = (
    *("--set", "model.d_model=16", "--set", "model.max_seq_len=32", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "diffuser.n_layers=1", "--set", "mla.n_heads=2"),
    *("--set", "mla.n_layers=1", "--max-steps", "3"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Path:
    """A folder with data, and the checkpoints and records of a transformer, a diffuser and NanoThink."""
    home = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_corpus, home / "data")
    where = ("--data-dir", str(home / "data"), "--checkpoint-dir", str(home / "checkpoints"))
    for kind, section in (("transformer", "train_expert"), ("diffuser", "train_diffuser")):
        more = ("--set", f"{section}.amp_dtype=float32", "--set", f"{section}.sample_tokens=4")
        assert run(["pretrain", kind, *where, "--tokenizer", str(tiny_tokenizer), *SMALL, *more]) == 0
    experts = [str(home / "checkpoints" / f"{kind}_expert.pt") for kind in ("transformer", "diffuser")]
    more = ("--set", "train_mla.amp_dtype=float32", "--set", "train_mla.sample_tokens=4")
    assert run(["train-mla", *where, *(w for e in experts for w in ("--expert", e)), *SMALL, *more]) == 0
    return home


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def held_out(home: Path, domain: str) -> list[str]:
    lines = (home / "data" / domain / "texts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_whole_page(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "report.html"
    code = run(["report", "--checkpoint-dir", str(trained / "checkpoints"), "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert said["report"] == str(out)
    assert said["n_bytes"] == out.stat().st_size
    assert [(r["kind"], r["step"], bool(r["passages"])) for r in said["runs"]] == [
        ("transformer", 3, False),
        ("diffuser", 3, True),
        ("nanothink_mla", 3, True),
    ]
    html = out.read_text("utf-8")
    # The coloured passage is the beginning of a text that is there, its weights are those of the experts.
    passages = re.findall(r'<p class="text passage"[^>]*>(.*?)</p>', html, re.S)
    assert len(passages) == 3
    for passage, domain in zip(passages, ("letters", "manuals", "tales"), strict=True):
        assert any(text.startswith(text_of(passage)) for text in held_out(trained, domain))
        for one, two in re.findall(r'title="transformer (\d+) %, diffuser (\d+) %"', passage):
            assert 99 <= int(one) + int(two) <= 101
    assert len(re.findall(r'title="transformer', html)) > 60
    for level in (10, 25, 50, 75, 100):
        assert f"level {level} of 100" in html


def test_a_page_without_data_or_checkpoints_says_so(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = trained / "records"
    shutil.copytree(trained / "checkpoints" / "runs", records / "runs")
    out = trained / "bare.html"
    assert run(["report", "--checkpoint-dir", str(records), "--out", str(out)]) == 0
    assert "Its checkpoint is not there" in capsys.readouterr().err
    assert "Its checkpoint is not there" in text_of(out.read_text("utf-8"))
    (trained / "data").rename(trained / "moved")
    try:
        home = ["--checkpoint-dir", str(trained / "checkpoints"), "--out", str(out)]
        assert run(["report", *home]) == 0
        assert "Name it: --data-dir DIR" in text_of(out.read_text("utf-8"))
        assert run(["report", *home, "--data-dir", str(trained / "moved")]) == 0
        assert 'class="text passage"' in out.read_text("utf-8")
    finally:
        (trained / "moved").rename(trained / "data")


def test_a_name_that_is_no_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "transformer", "--checkpoint-dir", str(trained / "checkpoints")]) == 2
    assert "Did you mean 'transformer_expert'?" in " ".join(capsys.readouterr().err.split())
