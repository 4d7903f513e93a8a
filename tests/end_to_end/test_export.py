"""`checkpoints export`: what other programs make of the folder, and what can go wrong on the way."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import write_random_checkpoint
from safetensors.torch import load_file, save_file

import nanothink as package
from nanothink.checkpoints.export import FILES
from nanothink.cli.app import run
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokenizer_files import CHAT_TEMPLATE
from nanothink.models import COMBINED
from nanothink.runs.exporting import export_checkpoint

TEXTS = [
    "time light stone, water 7.",
    " two  spaces\n\nand lines ",
    "spelled <|endoftext|> as text",
    "Ünïcødé 水 🌊",
    "don't , stop .",
]


@pytest.fixture
def checkpoint(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the checkpoint of a model with random weights."""

    def write(kind: str, **changes: Any) -> Path:
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        return write_random_checkpoint(tmp_path / f"{kind}.pt", tokenizer, kind, **changes)

    return write


def tokens(tokenizer: Tokenizer, batch: int, length: int) -> torch.Tensor:
    return torch.randint(tokenizer.vocab_size, (batch, length), generator=torch.Generator().manual_seed(5))


TRANSFORMERS = [
    {},
    {"transformer__tie_embeddings": True},
    {"model__d_model": 40, "transformer__n_heads": 5, "transformer__ffn_mult": 2.7},
    {"transformer__rope_theta": 500.0, "transformer__n_layers": 11, "transformer__n_heads": 1},
    {"transformer__rope_theta": 1e6, "transformer__tie_embeddings": True, "model__max_seq_len": 100},
]
STATE_SPACES = [
    {},
    {"state_space__tie_embeddings": True},
    {
        "model__d_model": 40,
        "transformer__n_heads": 5,
        "state_space__d_state": 5,
        "state_space__conv_width": 3,
    },
    {"state_space__expand": 3, "state_space__delta_rank": 7, "state_space__n_layers": 11},
]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*(("transformer", s) for s in TRANSFORMERS), *(("state_space", s) for s in STATE_SPACES)],
)
def test_transformers_opens_it_with_equal_logits(
    kind: str, shape: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = checkpoint(kind, **shape)
    done = export_checkpoint(path, tmp_path / "out")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == done.architecture
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    ours = package.load(path)
    x = tokens(ours.tokenizer, 3, 40)
    expected = ours.logits(x)
    assert expected.std() > 0.1  # or equal logits would say nothing
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(x).logits, expected, rtol=0, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == done.n_parameters


@pytest.mark.parametrize("kind", ["transformer", "state_space", "diffuser", COMBINED])
@pytest.mark.parametrize("tied", [False, True])
def test_nanothink_opens_it_again(
    kind: str, tied: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint(kind, transformer__tie_embeddings=tied, state_space__tie_embeddings=tied)
    assert export_checkpoint(path, tmp_path / "out").notes == ()
    ours, again = package.load(path), package.load(tmp_path / "out")
    assert again.notes == ()
    assert again.kind == kind
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    x = tokens(ours.tokenizer, 2, 40)
    assert torch.equal(again.logits(x), ours.logits(x))
    assert again.generate("time", max_new_tokens=8, seed=1) == ours.generate("time", max_new_tokens=8, seed=1)
    if kind == COMBINED:
        assert again.model.names == ours.model.names
        assert torch.equal(again.routing(x), ours.routing(x))


def test_the_store_stays_behind_and_that_is_said(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(COMBINED, vector_store__enabled=True)
    (note,) = export_checkpoint(path, tmp_path / "out").notes
    assert "vector store is not part of the export" in note
    again = package.load(tmp_path / "out")
    assert again.notes == ()
    x = torch.ones(1, 8, dtype=torch.int64)
    assert torch.equal(again.logits(x), package.load(path, vector_store=False).logits(x))


def test_the_tokenizer_gives_the_same_ids(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = checkpoint("transformer")
    export_checkpoint(path, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = package.load(path).tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 48


def test_where_transformers_would_take_another_tokenizer_that_is_said(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    path = checkpoint("transformer", transformer__qk_norm=False, transformer__attention_bias="qkv")
    (note,) = export_checkpoint(path, tmp_path / "out").notes
    assert "PreTrainedTokenizerFast has the right tokens" in note
    assert "PreTrainedTokenizerFast.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out"), package.load(path).tokenizer
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_llama_cpps_converter_pads_no_list_of_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    export_checkpoint(checkpoint("state_space"), tmp_path / "out")
    # What its converter reads, with 8 where it is missing; the embedding would not be padded.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_vocab_size_multiple"] == 1


def test_settings_that_generation_needs(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint("transformer", transformer__rope_theta=777.0)
    export_checkpoint(path, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.head_dim, config.max_position_embeddings, config.rms_norm_eps) == (16, 48, 1e-6)
    assert config.rope_parameters["rope_theta"] == 777.0
    assert config.tie_word_embeddings is False
    ours, theirs = package.load(path), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    eos = ours.tokenizer.eos_id
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == eos
    prompt = ours.tokenizer.encode("time light")
    found = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, top_k=None)
    (expected,) = ours.continue_tokens([prompt], temperature=0.0, max_new_tokens=20)
    written = found[0, len(prompt) :].tolist()
    assert written[: len(expected)] == expected
    assert written[len(expected) :] in ([], [eos])


def test_nothing_of_the_machine_is_in_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    export_checkpoint(checkpoint(COMBINED), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted({*FILES} - {CHAT_TEMPLATE})
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert b"somebody" not in content, path
        assert str(tmp_path).encode() not in content, path
        assert path.stat().st_mode & 0o077 == (tmp_path / "out").stat().st_mode & 0o066, path


def test_as_a_command(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = checkpoint("state_space"), tmp_path / "deep" / "out"
    assert run(["checkpoints", "export", "--checkpoint-dir", str(tmp_path), "--to", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["checkpoint"], said["architecture"]) == (str(path), "MambaForCausalLM")
    assert said["n_bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert "AutoModelForCausalLM.from_pretrained" in said["how_to_load"]
    assert run(["checkpoints", "export", str(path), "--to", str(out), "--overwrite"]) == 0
    assert "MambaForCausalLM" in capsys.readouterr().out
    assert run(["generate", "time", "-c", str(out), "-n", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("time")
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("held", ["notes.txt", "config.json and more", "export", "a file", "here"])
def test_what_is_in_the_way_stays(
    held: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, out = checkpoint("transformer"), tmp_path / "out"
    overwrite: tuple[str, ...] = ("--overwrite",)
    if held == "a file":
        out.write_text("mine")
    elif held == "here":
        out.mkdir()
        monkeypatch.chdir(out)
    elif held == "export":
        export_checkpoint(path, out)
        overwrite = ()
    else:
        out.mkdir()
        for name in ("config.json", "model.safetensors", "mine") if "more" in held else ("notes.txt",):
            (out / name).write_text("mine")
    before = {p: p.stat().st_ino for p in tmp_path.rglob("*")}
    assert run(["checkpoints", "export", str(path), "--to", str(out), *overwrite]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--to" in said.err
    assert ("--overwrite" in said.err) == (held == "export")
    assert {p: p.stat().st_ino for p in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled_and_an_export_replaced(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_checkpoint(checkpoint("transformer"), out)
    leftover = tmp_path / f".out.{os.uname().nodename[:40]}.999999999.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    export_checkpoint(checkpoint("state_space"), out, overwrite=True)
    assert package.load(out).kind == "state_space"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_full_disk_leaves_what_was_there(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the write in the same way."""
    path, out = checkpoint("transformer"), tmp_path / "out"
    export_checkpoint(path, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    command = [sys.executable, "-m", "nanothink", "checkpoints", "export", str(path), "--to", str(out)]
    done = subprocess.run(
        [*command, "--overwrite"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Cannot write {out}: File too large.")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _cut(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])

    return damage


def _pipe(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        (out / name).unlink()
        os.mkfifo(out / name)

    return damage


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        settings = json.loads((out / "config.json").read_text())
        change(settings)
        (out / "config.json").write_text(json.dumps(settings))

    return damage


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        weights = load_file(out / "model.safetensors")
        change(weights)
        save_file(weights, out / "model.safetensors", {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut("model.safetensors"), "damaged"),
        (_cut("config.json"), "damaged"),
        (_cut("tokenizer.json"), "tokenizer"),
        (lambda out: (out / "model.safetensors").unlink(), "missing"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer"),
        (_pipe("model.safetensors"), "model.safetensors is not a regular file"),
        (_pipe("training_documents.st"), "training_documents.st is not a regular file"),
        (lambda out: (out / "config.json").write_text("[" * 100_000), "damaged"),
        (_edit(lambda s: s.pop("nanothink")), "none that NanoThink exported"),
        (_edit(lambda s: s["nanothink"].pop("kind")), "damaged"),
        (_edit(lambda s: s["nanothink"].update(kind="somebody's")), "somebody's"),
        (_edit(lambda s: s["nanothink"].update(kind="state_space")), "hardly anything"),
        (_edit(lambda s: s["nanothink"].update(format_version=1)), "format 1"),
        (_edit(lambda s: s["nanothink"].pop("format_version")), "format 1"),
        (
            _weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
            "q_proj.bias",
        ),
        (_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "up_proj.weight"),
        (_edit(lambda s: s["nanothink"].update(config=[])), "damaged"),
        (_edit(lambda s: s["nanothink"]["config"]["model"].update(d_model=64)), "hardly anything"),
        (_edit(lambda s: s["nanothink"]["config"]["model"].update(d_model=-3)), "model.d_model"),
    ],
)
def test_a_damaged_export_is_refused(
    damage: Callable[[Path], None],
    reason: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_checkpoint(checkpoint("transformer"), tmp_path / "out")
    damage(tmp_path / "out")
    assert run(["generate", "x", "-c", str(tmp_path / "out")]) in (1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert reason in said.err


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_code_in_an_export_is_never_run(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_tokenizer: bool,
) -> None:
    export, mark = tmp_path / "export", tmp_path / "code was run"
    export_checkpoint(checkpoint("transformer"), export)
    for name in ("tokenization_evil.py", "tokenizer.py", "configuration_evil.py", "modeling_evil.py"):
        (export / name).write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", None], "AutoConfig": "configuration_evil.Evil"}
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((export / name).read_text())
        content |= {"auto_map": auto_map, "model_type": "evil", "tokenizer_class": "Evil"}
        (export / name).write_text(json.dumps(content))
    if not with_tokenizer:
        (export / "tokenizer.json").unlink()
        (export / "vocab.txt").write_text("[UNK]\nHello\nworld\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 100))
    monkeypatch.setattr("builtins.input", lambda _prompt="": "yes")
    code = run(["eval", str(export), "--data-dir", str(tiny_corpus), "--max-tokens", "500"])
    assert code == (0 if with_tokenizer else 1)
    assert with_tokenizer or "tokenizer.json is missing" in capsys.readouterr().err
    assert not mark.exists()


def test_a_stranger_s_model_is_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert run(["eval", str(tmp_path)]) == 1
    assert "none that NanoThink exported" in capsys.readouterr().err
