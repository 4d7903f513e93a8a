"""``checkpoints import``: a published model gives the logits and the text that transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_models import FAMILIES, SHAPE, imported
from stand_in_hub import serving

import nanothink as package
from nanothink.checkpoints import read_checkpoint, write_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.cli.app import run
from nanothink.data.split import HeldOutText, SplitRule, TrainedText
from nanothink.errors import (
    UsageError,
)
from nanothink.models.decoding import steps_by
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.runs.exporting import export_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_equal_those_of_transformers(
    family: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    architecture, settings = FAMILIES[family]
    folder, theirs = published(architecture, padding=5, **settings)
    done = imported(folder)
    assert (done.path.name, done.family) == ("published_expert.pt", family.partition(",")[0])
    assert (done.licence, done.n_cut_rows) == ("apache-2.0", 5)
    ours = package.load(done.path)
    assert ours.notes == ()
    n_tokens = ours.tokenizer.vocab_size
    x = torch.randint(n_tokens, (3, 61), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = theirs(x).logits[..., :n_tokens]
    assert expected.std() > 0.1  # or equal logits would say nothing
    torch.testing.assert_close(ours.logits(x), expected, rtol=0, atol=1e-4)

    tokens = ours.tokenizer.encode("time light stone")
    for _ in range(20):
        with torch.inference_mode():
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1, :n_tokens].argmax()))
    start = len(ours.tokenizer.encode("time light stone"))
    (written,) = ours.continue_tokens([tokens[:start]], temperature=0.0, max_new_tokens=20, stop_at_eos=False)
    assert written == tokens[start:]


def test_a_window_that_no_context_leaves_is_no_window(published: Callable[..., tuple[Path, Any]]) -> None:
    folder, theirs = published("Mistral", **{**SHAPE, "sliding_window": 30})
    ours = package.load(imported(folder, context=30).path)
    assert ours.model.context_length == 30
    x = torch.randint(ours.tokenizer.vocab_size, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("gpt")])
def test_an_export_of_it_is_the_published_model_again(
    family: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    architecture, settings = FAMILIES[family]
    folder, theirs = published(architecture, **settings)
    export_checkpoint(imported(folder).path, folder.parent / "out")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
    assert "license: apache-2.0" in (folder.parent / "out" / "README.md").read_text()
    x = torch.randint(theirs.config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_an_export_of_ours_comes_back_with_what_it_was_trained_on(
    published: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    own = folder.parent / "own.pt"
    payload = read_checkpoint(imported(folder).path)
    known = SplitRecord(SplitRule(0.2), ("a",), TrainedText(np.arange(3, dtype=np.uint64)), HeldOutText())
    payload["split"] = known.to_state()
    write_checkpoint(own, payload)
    export_checkpoint(own, folder.parent / "out")
    again = package.load(imported(folder.parent / "out").path)
    assert (again.split.rule, again.split.trained) == (known.rule, known.trained)


def test_shards_and_half_precision_are_read(published: Callable[..., tuple[Path, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    folder, theirs = published("Llama", **{**SHAPE, "hidden_size": 42})
    (folder / "model.safetensors").unlink()
    theirs.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    done = imported(folder)
    payload = read_checkpoint(done.path)
    half = {name for name, weight in payload["model_state"].items() if weight.dtype is torch.bfloat16}
    assert len(half) == 7 * SHAPE["num_hidden_layers"]  # tables and norms are float32
    assert done.matrix_type == "bfloat16"
    entry = payload["run"]["imported"]
    assert (entry["stored_as"], entry["family"], entry["source"]) == ("bfloat16", "llama", str(folder))
    loaded = package.load(done.path)
    assert loaded.notes == ()
    ours = dict(loaded.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert ours[name].dtype is (torch.bfloat16 if name in half else torch.float32)
        assert torch.equal(ours[name].float(), parameter.float()[: ours[name].shape[0]]), name

    x = torch.randint(loaded.tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # with exact rotary tables
        expected = wide(x).logits[..., : loaded.tokenizer.vocab_size]
        torch.testing.assert_close(loaded.logits(x), expected, rtol=0, atol=1e-4)
        for way in ("compiled", "plain", "model"):
            with steps_by(way):
                state, stepped = loaded.model.start(2), []
                for token in x.T:
                    stepped.append(loaded.model.step(token[:, None], state))
            torch.testing.assert_close(torch.stack(stepped, 1), expected, rtol=0, atol=1e-4)
        export_checkpoint(done.path, folder.parent / "out")
        again = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
        torch.testing.assert_close(again(x).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [(), ("--lora", "2")])
def test_bfloat16_matrices_stay_so_under_adapters_and_inside_nanothink(
    options: tuple[str, ...],
    published: Callable[..., tuple[Path, Any]],
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training all weights needs float32; the base of adapters and a frozen expert keep what they are."""

    def counted(*line: str) -> int:
        """Bytes of weights by ``--dry-run``."""
        capsys.readouterr()
        assert run([*line, "--dry-run", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["memory"]["weights"])

    def saved(path: Path) -> int:
        weights = read_checkpoint(path)["model_state"]
        return sum(weight.nbytes for name, weight in weights.items() if not name.startswith(GATE_PREFIX))

    folder, theirs = published("Qwen3", **SHAPE)
    theirs.bfloat16().save_pretrained(folder)
    start = imported(folder).path
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path / "c"), "--max-steps", "2"]
    quick = [f"train_expert.{part}" for part in ("batch_size=2", "sample_tokens=4", "lr=0.01")]
    settings = [part for setting in (*quick, "model.max_seq_len=32") for part in ("--set", setting)]
    line = ["pretrain", "transformer", "--init", str(start), *where, *settings, *options]
    n_bytes = counted(*line)
    assert run(line) == 0
    assert n_bytes == saved(tmp_path / "c" / "transformer_expert.pt")
    assert counted("pretrain", "transformer", "--resume", *where, *settings, *options) == n_bytes
    trained = read_checkpoint(tmp_path / "c" / "transformer_expert.pt")["model_state"]
    before = read_checkpoint(start)["model_state"]
    for name, weight in before.items():
        assert trained[name].dtype is (weight.dtype if options else torch.float32)
        assert torch.equal(trained[name], weight) is bool(options)
    assert package.load(tmp_path / "c" / "transformer_expert.pt").notes == ()
    if options:
        small = ["--set", "train_mla.batch_size=2", "--set", "train_mla.sample_tokens=0"]
        small += ["--set", "model.max_seq_len=32", "--set", "train_mla.fit=full", "--set", "mla.n_heads=2"]
        line = ["train-mla", "--expert", str(start), *where, *small]
        n_bytes = counted(*line)
        assert run(line) == 0
        assert n_bytes == saved(tmp_path / "c" / "nanothink_mla.pt")
        inside = read_checkpoint(tmp_path / "c" / "nanothink_mla.pt")["model_state"]
        assert all(torch.equal(inside[f"experts.0.{name}"], weight) for name, weight in before.items())
        loaded = package.load(tmp_path / "c" / "nanothink_mla.pt")
        assert loaded.notes == ()
        assert isinstance(loaded.generate("time", max_new_tokens=3), str)


def test_a_name_on_the_hub_is_fetched_once(
    published: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, theirs = published("Qwen3", **SHAPE)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_mine.py": b"raise SystemExit"}

    def fetch(name: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "nanothink", "checkpoints", "import", "me/mine", "--name", name]
        where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            line, cwd=tmp_path, env=environment | where, capture_output=True, text=True, check=False
        )

    with serving(files) as endpoint:
        first = fetch("first", endpoint)
    assert first.returncode == 0, first.stderr
    assert fetch("second", endpoint).returncode == 0  # the server is gone
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix in (".bin", ".py")]
    ours = package.load(tmp_path / "checkpoints" / "second_expert.pt")
    x = torch.randint(ours.tokenizer.vocab_size, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, rtol=0, atol=1e-4)


def test_an_earlier_checkpoint_is_replaced_on_request_alone(
    published: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    first = imported(folder)
    with pytest.raises(UsageError, match="--overwrite"):
        imported(folder)
    assert imported(folder, name="other").path.name == "other_expert.pt"
    assert imported(folder, overwrite=True).path == first.path
    assert len(list((first.path.parent / "replaced").rglob("*.pt"))) == 1


def test_commands_take_an_imported_model(
    published: Callable[..., tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = published("Llama", **{**SHAPE, "hidden_size": 42})
    checkpoints, data = tmp_path / "c", tmp_path / "data"
    (data / "a").mkdir(parents=True)
    lines = [json.dumps({"text": f"time light stone {n} water"}) for n in range(40)]
    (data / "a" / "a.jsonl").write_text("\n".join(lines))
    where = ["--checkpoint-dir", str(checkpoints)]
    assert run(["checkpoints", "import", str(folder), "--name", "their", *where, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["path"]
    assert path == str(checkpoints / "their_expert.pt")
    assert run(["checkpoints", "show", path]) == 0
    shown = capsys.readouterr().out
    assert "apache-2.0" in shown
    assert "what it was trained on is unknown" in shown
    assert run(["checkpoints", "verify", path]) == 0
    assert run(["generate", "time", "-c", path, "-n", "4"]) == 0
    capsys.readouterr()
    assert run(["eval", path, "--data-dir", str(data), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["trained_text_known"], row["seen_documents"]) == (False, 0)
    assert run(["eval", path, "--data-dir", str(data)]) == 0
    assert "trained on is unknown" in " ".join(capsys.readouterr().out.split())
