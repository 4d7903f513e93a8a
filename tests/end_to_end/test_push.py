"""`checkpoints push`: what a Hub on this machine gets, and what is said where it gets nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from forking_shell import quick
from random_checkpoints import write_random_checkpoint
from stand_in_hub import Repositories, taking_pushes

import nanothink
from nanothink.cli.app import run
from nanothink.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Use .content:DeprecationWarning")  # of huggingface_hub
KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repositories]:
    with taking_pushes() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield found


@pytest.fixture
def checkpoint(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """Of a transformer with random weights, which no text was read for."""
    return write_random_checkpoint(tmp_path / "some.pt", load_tokenizer(str(tiny_tokenizer)), "transformer")


@pytest.fixture(scope="module")
def trained(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model of every kind."""
    folder = tmp_path_factory.mktemp("pushed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick(steps=3, max_keys=500).items():
            patch.setenv(name, value)
        where = ["--checkpoint-dir", str(folder), "--data-dir", str(tiny_corpus)]
        for kind in KINDS[:3]:
            assert run(["pretrain", kind, *where, "--tokenizer", str(tiny_tokenizer)]) == 0
        assert run(["train-mla", *where]) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_gets_a_model_with_a_card_of_its_run(
    trained: Path, hub: Repositories, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = trained / (f"{kind}.pt" if kind == KINDS[3] else f"{kind}_expert.pt")
    assert run(["checkpoints", "push", "mine", str(path), "--license", "cc-by-4.0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["url"] == f"{hub.url}/me/mine/commit/{1:040}"
    assert hub.private == {"me/mine": True}
    files = hub.files["me/mine"]
    card = files["README.md"].decode()
    assert card == said["card"]
    assert "\nlicense: cc-by-4.0\n" in card
    scored = [line for line in card.splitlines() if line.startswith("| all |")]
    assert len(scored) == 1
    domains = nanothink.load(path, device="cpu", vector_store=False).config.data.domains or ()
    assert all(f"| {domain} | " in card for domain in domains)
    assert "d_model = 16" in card
    assert str(trained) not in card
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = nanothink.load(tmp_path, device="cpu")
    assert again.kind == kind
    texts = [m.generate("The", seed=1, max_new_tokens=8) for m in (again, nanothink.load(path, device="cpu"))]
    assert texts[0] == texts[1]


def test_a_repository_that_is_there_gets_a_commit_only_if_asked(
    checkpoint: Path, hub: Repositories, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["checkpoints", "push", "me/mine", str(checkpoint), "--license", "mit"]
    assert run([*command, "--public"]) == 0
    assert not hub.private["me/mine"]
    assert run(command) == 2
    assert "has a repository me/mine already" in capsys.readouterr().err
    assert hub.n_commits == 1
    assert run([*command, "--overwrite"]) == 0
    assert hub.n_commits == 2


def test_a_dry_run_shows_the_card_and_asks_nobody(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert run(["checkpoints", "push", "me/mine", str(checkpoint), "--license", "mit", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "license: mit" in shown
    assert "nothing was uploaded" in shown


@pytest.mark.parametrize(
    ("options", "token", "refuse", "said"),
    [
        ([], "hf_mine", None, "Which licence does this model have?"),
        (["--license", "MIT license"], "hf_mine", None, "use the Hub's name of a licence"),
        (["--license", "mit"], None, None, "hf auth login"),
        (["--license", "mit"], "hf_other", None, "The Hub refuses this token"),
        (["--license", "mit"], "hf_mine", 403, "The Hub refuses this token"),
        (["--license", "mit"], "hf_mine", 500, "The Hub did not take me/mine"),
    ],
)
def test_what_keeps_a_model_from_the_hub_is_said(
    checkpoint: Path,
    hub: Repositories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    token: str | None,
    refuse: int | None,
    said: str,
) -> None:
    hub.refuse = refuse
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none either"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert run(["checkpoints", "push", "me/mine", str(checkpoint), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not hub.n_commits


def test_bad_names_and_no_network_are_said(
    checkpoint: Path, hub: Repositories, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["checkpoints", "push", "me/mine/other", str(checkpoint), "--license", "mit"]) == 2
    assert "is no name of a repository" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    assert run(["checkpoints", "push", "me/mine", str(checkpoint), "--license", "mit"]) == 1
    assert "The Hub cannot be reached, and nothing was uploaded" in capsys.readouterr().err
