"""Every benchmark that the documentation, the Makefile or a benchmark's own ``--help`` shows.

``make test`` lets each read its command line, which takes seconds. ``make test-bench`` runs it as it stands,
in a folder that has what its words name (DATA, TOKENIZER, checkpoints/), and puts behind it what makes it
small: ``SMALL``. A command for a GPU runs on the CPU then.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from documentation import PAGES, ROOT
from forking_shell import ForkingShell

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "\ndef main(" in path.read_text("utf-8")]


def documented() -> Iterator[str]:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)  # those are examples
        yield from re.findall(r"`python (benchmarks/[^`]+\.py[^`]*)`", text)
        yield from re.findall(r"^ {4}python (benchmarks/.+)$", text, flags=re.M)
    for script in SCRIPTS:  # where a sentence may stand behind a command
        yield from re.findall(
            r"^ {4}python (benchmarks/.+?)(?: {2,}.*)?$", script.read_text("utf-8"), flags=re.M
        )
    for command in re.findall(r"\$\(BIN\)/python (benchmarks/.+)", (ROOT / "Makefile").read_text("utf-8")):
        yield re.sub(r"\$\((\w+)\)", r"\1", command)


COMMANDS = sorted({" ".join(command.split()) for command in documented()} - {"benchmarks/NAME.py"})


@dataclass(frozen=True)
class Small:
    """How a benchmark is kept small, and what it must print even so.

    Attributes:
        options: put behind the documented ones; the last word on an option counts.
        rows: of all tables together.
        named: what must be a cell of some row.
        said: patterns of the other figures.
    """

    options: str
    rows: int
    named: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


TINY = "--set model.d_model=16 --set model.max_seq_len=32"  # as the checkpoints here
ONE_STEP = "--expert-steps 2 --steps 1 --batch 1 --tokens 50 --seeds 0 --vocabulary 300"
ONE_POINT = "--points 1 --tokens 256 --megabytes 1 --kinds"
KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla")
QWEN3 = "Qwen3, transformers"
SCANS = ("mambapy", "transformers+mambapy", "plain", "compiled")
NUMBER = r"\d[\d,.]*"

SMALL = {
    "drafts.py checkpoints": Small("--tokens 6 --rounds 1", rows=6, named=("greedy", "drawn")),
    "drafts.py": Small("--preset tiny --vocabulary 300 --tokens 6 --rounds 1 --acceptance 0.7", rows=2),
    "decoding.py": Small("--lengths 8 --rounds 1", rows=1),
    "diffuser.py ablate": Small(f"--steps 1 {TINY}", rows=1, said=(rf"100: {NUMBER}",)),
    "diffuser.py cost": Small("--batch 1 --rounds 1", rows=2, said=(rf"pair by pair: median {NUMBER}",)),
    "diffuser.py pair": Small(f"--steps 1 --seeds 0 {TINY}", rows=2, named=("transformer", "diffuser")),
    "diffuser.py sampling": Small(
        "--samples 1 --ddim 2 --prompt-tokens 4 --sample-tokens 8",
        rows=4,
        named=("the text itself", "head, null noise", "DDIM, 2 steps", "the transformer itself"),
    ),
    "distillation.py leak": Small(
        "", rows=0, said=(rf"own document left out +{NUMBER} nats", rf"32: {NUMBER}")
    ),
    "distillation.py students": Small(
        f"--set train_expert.max_steps=2 --set distillation.top_k=4 {TINY}",
        rows=6,
        named=("single model", "its teacher", "text", "versions of the text", "versions and written"),
        said=(r"The best of 2 single models is \S+_expert\.pt",),
    ),
    "diverging_rates.py": Small("", rows=20, named=(*KINDS, "lr 10, all multipliers 1e6", "finite")),
    "expert_states.py --loss": Small("", rows=3, named=("torch.float32", "torch.float16")),
    "expert_states.py": Small(
        "--rounds 1 --only 'width 64'", rows=3, named=("computed", "first epoch", "later epochs")
    ),
    "generation.py": Small(
        "--preset tiny --tokens 4 --rounds 1 --batch 1 --cpu-time",
        rows=24,
        named=(
            "nanothink, nanothink_mla",
            "nanothink, transformer, no compiler",
            "llama.cpp, f32",
            QWEN3,
            "GPT-2, transformers",
            "Mamba, transformers",
        ),
    ),
    "repetition.py": Small(
        "--texts 2 --tokens 4 --prompt 40 --continued 40",
        rows=3,
        named=("the text itself", "no cache, temperature 0.8", "document cache, temperature 0.8"),
    ),
    "serving.py": Small("--seconds 1 --clients 1 2 --tokens 4", rows=2, said=(r"left with 0\.",)),
    "malformed_requests.py": Small("--examples 1 --mutated 100", rows=1, said=(r"left with 0\.",)),
    # A process for each point, so each kind has its turn in one of the four.
    "growth.py context batch size": Small(f"{ONE_POINT} diffuser", rows=3, named=("diffuser",)),
    "growth.py context batch": Small(f"{ONE_POINT} state_space", rows=2, named=("state_space",)),
    "growth.py --device cuda": Small(f"{ONE_POINT} nanothink_mla", rows=4, named=("nanothink_mla", "1 MB")),
    "growth.py": Small(
        f"{ONE_POINT} transformer '{QWEN3}'",
        rows=7,
        named=("transformer", QWEN3, "1 MB"),
        said=("plots: docs",),
    ),
    "kill_campaign.py --kills 20 --kinds diffuser": Small(
        "--kills 2 --fresh 1", rows=2, said=(r"Failures: 0\.",)
    ),
    "kill_campaign.py": Small("--kills 4 --fresh 0", rows=5, named=(*KINDS, "all"), said=(r"Failures: 0\.",)),
    "lm_eval/compare.py": Small(
        "--bytes 3000",
        rows=4,
        named=("one text a domain", "one text a domain, served", "document by document"),
        said=("held-out documents",),
    ),
    "lost_processes.py": Small('--only "0 raises"', rows=1, named=("rank 0 raises an exception", "yes")),
    "many_files.py": Small(
        "--files 60 --domains 20 --descriptors 64 --steps 2",
        rows=5,
        named=("data validate", "tokenizer train", "data inspect, nothing kept", "data inspect, again"),
    ),
    "vector_store.py add": Small(
        "--tokens 50",
        rows=3,
        named=("without a memory", "once the domain is in it"),
        said=(r"'manual': \d+",),
    ),
    "vector_store.py compact": Small("--tokens 50", rows=4, named=("as built", "0.99", "0.95", "0.9")),
    "vector_store.py quality": Small(
        "--steps 2 --batch 1 --tokens 50 --set vector_store.max_keys=2000",
        rows=4,
        named=("trained without a memory", "trained and asked with it", "share of the gate"),
        said=(r"lower than 'trained without a memory' by -?\d",),
    ),
    "vector_store.py recall": Small("--blocks 1", rows=5, named=("exact", "4 lists"), said=("bytes a key",)),
    "vector_store.py scale": Small("--keys 2000", rows=5, named=("exact", "32 lists"), said=("bytes a key",)),
    "newton_schulz.py": Small("--rounds 1", rows=8, named=("16 of 32 x 32",)),
    "optimizers.py --data-dir DATA --tokenizer TOKENIZER --steps 150 300 --only muon": Small(
        f"--steps 1 {TINY}", rows=7, named=("muon",)
    ),
    "optimizers.py": Small(f"--steps 1 {TINY}", rows=13, named=("adamw", "muon")),
    "process_memory.py --frozen-experts": Small("", rows=3, named=("shared out", "whole, bfloat16")),
    "process_memory.py --shard": Small("", rows=2, named=("`full`", "`none`")),
    "process_memory.py --measured": Small("", rows=8, named=("transformer", "nanothink_mla", "resumed")),
    "process_memory.py": Small("", rows=6, named=("125 M", "7 B")),
    "published_weights.py": Small(
        "--data-dir DATA --kilobytes 8 --held-out 4 --ways frozen lora --steps 1 --batch 1 --length 32",
        rows=2,
        named=("frozen", "lora"),
    ),
    "quality.py domains": Small(ONE_STEP, rows=9, named=("uniform ensemble, linear", "NanoThink")),
    "quality.py shared --data-dir DATA --single": Small(
        ONE_STEP, rows=11, named=("one transformer of its size, in the same time",)
    ),
    "quality.py shared": Small(ONE_STEP, rows=9, named=("diffuser", "NanoThink", "without its diffuser")),
    "selective_scan.py": Small(
        "--length 32 --rounds 1", rows=13, named=("mambapy", "plain", "compiled", "transformers, naive")
    ),
    "selective_scan_gpu.py": Small("--device cpu --sides triton plain --size 1 8 16 16 --rounds 1", rows=4),
    "startup.py": Small(
        "--rounds 1", rows=7, named=("nanothink --help", "nanothink generate -n 1", "import torch")
    ),
    "small_text.py": Small(
        "--megabytes 0.05 --seeds 0 --settings 2 --finalists 1 --held-out 4 --longest 2 --vocabulary 300"
        " --set train_expert.max_steps=1 --set train_mla.max_steps=1",
        rows=15,
        named=("state-space 128 x 3, 0.3, 0.1, 16", "ensemble", "(i) below the first version", "2 of 30"),
    ),
    "state_space.py step --threads 1 --length 128 --sides": Small(
        "--batch 1 --length 32 --rounds 1", rows=3, named=("transformers", "plain", "compiled")
    ),
    "state_space.py step": Small(
        "--batch 1 --length 32 --rounds 1",
        rows=4,
        named=SCANS,
    ),
    "state_space.py memory": Small("--batch 1 --length 32", rows=4, named=SCANS),
    "state_space.py decode": Small(
        "--tokens 4 --far 100 --rounds 1",
        rows=2,
        named=("transformers, cached", "nanothink"),
        said=(rf"one step: {NUMBER} ms at position 10, {NUMBER} ms at position 100",),
    ),
    "state_space.py length": Small(
        "--lengths 32", rows=1, said=("plot: docs/figures/state_space_length.svg",)
    ),
    "time_to_quality.py": Small(
        f"--preset tiny --steps 2 --turn 1 --eval-tokens 50 {TINY}",
        rows=5,
        named=("GPT-2, Trainer's settings", "GPT-2, tuned", "nanothink"),
    ),
    "time_to_quality.py --sweep": Small(
        f"--preset tiny --steps 2 --turn 1 --eval-tokens 50 {TINY}",
        rows=13,
        named=("0.005", "GPT-2, tuned", "nanothink"),
    ),
    "tokenising.py": Small("--rounds 1", rows=3, named=("datasets.map", "tokenizers.encode_batch_fast")),
    # A processor without AMX takes minutes for GPT-2's step in bfloat16.
    "training_step.py --sides nanothink gpt2": Small(
        "--batch 1 --memory-batch 0 --rounds 1 --dtype float32", rows=2, named=("nanothink", "gpt2")
    ),
    "training_step.py --": Small(
        "--batch 1 --memory-batch 0 --rounds 1", rows=4, named=("nanothink-adamw", "gpt2", "qwen3")
    ),
    "training_step.py": Small(
        "--batch 1 --memory-batch 1 --rounds 1",
        rows=8,
        named=("nanothink-adamw", "gpt2", "qwen3"),
        said=(rf"s against gpt2: median {NUMBER}", rf"peak memory of nanothink against qwen3: {NUMBER}"),
    ),
    "usual_gate.py": Small(
        "--max-tokens 300", rows=0, said=(rf"temperature \[{NUMBER}", rf"{NUMBER} bits per byte")
    ),
    "validate.py": Small(
        "--megabytes 1 --repeats 1", rows=0, said=(rf"nanothink data validate +{NUMBER} +{NUMBER}x",)
    ),
}


def small(command: str) -> Small:
    """By the longest beginning that stands in SMALL."""
    keys = [key for key in SMALL if command.startswith(f"benchmarks/{key}")]
    assert keys, f"SMALL does not say how {command} is kept small"
    return SMALL[max(keys, key=len)]


@pytest.fixture(scope="session")
def project(shell: ForkingShell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documented words name: checkpoints of every kind, a memory kept in lists, text."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "VENV").symlink_to(Path(sysconfig.get_path("scripts")).parent)
    done = shell.run(
        """
        nanothink data sample DATA
        nanothink tokenizer train --data-dir DATA --vocab-size 512 --out TOKENIZER
        for kind in transformer state-space diffuser
        do nanothink pretrain $kind --data-dir DATA --tokenizer TOKENIZER
        done
        nanothink train-mla --data-dir DATA --use-vector-store --set vector_store.index=sq8
        mkdir DIR more
        cp checkpoints/*_expert.pt DIR
        cp -r DATA/manual more
        """,
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.bench
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_benchmark_runs(command: str, shell: ForkingShell, project: Path, tmp_path: Path) -> None:
    for named in project.iterdir():
        (tmp_path / named.name).symlink_to(named)
    expected = small(command)
    here = "--device cpu" if "--device cuda" in command else ""
    done = shell.run(f"python {command} {expected.options} {here}", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of_tables(done.stdout)
    assert len(rows) == expected.rows, done.stdout
    assert set(expected.named) <= {cell for row in rows for cell in row}, done.stdout
    for pattern in expected.said:
        assert re.search(pattern, done.stdout), f"{pattern}\n{done.stdout}"


def rows_of_tables(text: str) -> list[list[str]]:
    """Cells of the rows of all tables: as many as their head has, and every figure a number."""
    rows = []
    for head, body in re.findall(r"^(\|.+)\n\|[|:-]+\n((?:\|.+\n)*)", text, flags=re.M):
        for row in body.splitlines():
            assert row.count("|") == head.count("|"), row
            assert not re.search(r"\b(nan|inf|not finite)\b", row, flags=re.I), row
            rows.append([cell.strip(" *") for cell in row[1:-1].split("|")])
    return rows


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_benchmark_takes_its_command_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    script, *words = shlex.split(f"{command} {small(command).options}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{script} reads no command line")


def test_every_benchmark_is_listed_and_documented() -> None:
    scripts = {str(path.relative_to(BENCHMARKS)) for path in SCRIPTS}
    listed = re.findall(r"^ {4}(\S+\.py)", (BENCHMARKS / "README.md").read_text("utf-8"), flags=re.M)
    assert scripts - set(listed) == {"selective_scan_gpu.py"}
    assert {command.split()[0].removeprefix("benchmarks/") for command in COMMANDS} == scripts
