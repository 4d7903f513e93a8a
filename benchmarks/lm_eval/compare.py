"""An exported transformer in lm-eval (its own ``hf`` model) against ``nanothink eval``, on the same text.

    python benchmarks/lm_eval/compare.py checkpoints/transformer_expert.pt --lm-eval VENV/bin/lm_eval

The two programs read documents differently. ``nanothink eval`` strings the documents of a domain together,
EOS between them, and cuts the whole into blocks; EOS is predicted too. lm-eval reads every document from an
EOS on and never predicts one. Inside a document both cut alike: blocks of the context, one token of context
before each (lm-eval fills its last one up with tokens before). So the held-out text is scored twice:

    one text a domain    its documents with a blank line between them: both read the same, and must agree
    document by document a record each: what the habits of the two programs make of them

Each is read through ``nanothink serve`` too, by lm-eval's ``local-completions``: echo with log-probabilities.
Exits with 1 where one text a domain differs by more than half a percent. ``pip install -e '.[bench]'`` brings
lm-eval along; it may as well have an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASK = Path(__file__).resolve().parent
TOLERANCE = 0.005


def held_out(
    data_dir: str, domains: list[str] | None, checkpoint: Path, n_bytes: int
) -> dict[str, list[str]]:
    """Documents that the checkpoint was not trained on, by domain: about ``n_bytes`` of each."""
    import nanothink
    from nanothink.data.corpus import find_corpus
    from nanothink.data.records import iter_records
    from nanothink.data.split import text_key
    from nanothink.runs import held_out as split

    model = nanothink.load(checkpoint)
    corpus = find_corpus(data_dir, domains)
    tokens = split.held_out(corpus, [model], model.tokenizer)
    found: dict[str, list[str]] = {}
    for domain, paths in corpus.domains.items():
        wanted, size = set(tokens.val[domain].documents().keys.tolist()), 0
        texts = found.setdefault(domain, [])
        for path in paths:
            for _, record in iter_records(path, on_problem=print):
                if size < n_bytes and int(text_key(record.text)) in wanted:
                    texts.append(record.text)
                    size += len(record.text.encode())
        if not texts:
            raise SystemExit(f"domain '{domain}' has no whole document held out; leave it out by --domains")
    return found


def write(folder: Path, texts: dict[str, list[str]]) -> None:
    """The same records as a data folder for NanoThink and as one file for lm-eval."""
    with (folder / "held_out.jsonl").open("w", encoding="utf-8") as together:
        for domain, own in texts.items():
            (folder / "data" / domain).mkdir(parents=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (folder / "data" / domain / "held_out.jsonl").write_text(lines, encoding="utf-8")
            together.write(lines)


def nanothink_eval(checkpoint: Path, folder: Path) -> float:
    command = [sys.executable, "-m", "nanothink", "eval", str(checkpoint), "--data-dir", str(folder / "data")]
    done = subprocess.run(
        [*command, "--split", "all", "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    score: dict[str, Any] = json.loads(done.stdout)["checkpoints"][0]["overall"]
    return float(score["bits_per_byte"])


def lm_eval(program: str, model: list[str], folder: Path, batch: int) -> float:
    """Bits per byte of the folder's text under a model of lm-eval, given by its options."""
    command = [
        program,
        *model,
        "--include_path",
        str(TASK),
        "--tasks",
        "held_out",
        "--batch_size",
        str(batch),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    results = Path(tempfile.mkdtemp(dir=folder))
    done = subprocess.run(
        [*command, "--output_path", results],
        cwd=folder,
        env={**os.environ, **offline},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"lm-eval failed:\n{done.stderr[-3000:]}")
    (result,) = results.rglob("results_*.json")
    return float(json.loads(result.read_text())["results"]["held_out"]["bits_per_byte,none"])


@contextmanager
def served(checkpoint: Path, context: int) -> Iterator[list[str]]:
    """``nanothink serve``, as a model of lm-eval."""
    command = [sys.executable, "-m", "nanothink", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().partition(" at ")[2].partition("/v1;")[0]
        arguments = f"model={checkpoint.stem},base_url={url}/v1/completions,max_length={context}"
        try:
            yield ["--model", "local-completions", "--model_args", arguments]
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", default=None, help="default: what the checkpoint was trained on")
    parser.add_argument("--domains", nargs="+", default=None)
    parser.add_argument("--bytes", type=int, default=100_000, help="held-out text of each domain, about")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lm-eval", default="lm_eval", help="the program")
    options = parser.parse_args()
    found = shutil.which(options.lm_eval)
    if found is None:
        parser.error(
            f"there is no program {options.lm_eval}: pip install -e '.[bench]', or name it by --lm-eval"
        )
    program = str(Path(found).absolute())  # it runs in another folder

    import nanothink
    from nanothink.runs.exporting import export_checkpoint

    data_dir = options.data_dir or nanothink.load(options.checkpoint).config.data.data_dir
    documents = held_out(data_dir, options.domains, options.checkpoint, options.bytes)
    sides = {
        "one text a domain": {domain: ["\n\n".join(texts)] for domain, texts in documents.items()},
        "document by document": documents,
    }
    n_bytes = sum(len(text.encode()) for texts in documents.values() for text in texts)
    n_documents = sum(map(len, documents.values()))
    print(f"{n_documents} held-out documents of {len(documents)} domains, {n_bytes:,} bytes\n")
    print("| bits per byte | nanothink eval | lm-eval | ratio |\n|---|---:|---:|---:|")
    ratios = {}
    length = nanothink.load(options.checkpoint).config.model.max_seq_len
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        export_checkpoint(options.checkpoint, export)
        for name, texts in sides.items():
            place = Path(folder) / name.replace(" ", "_")
            place.mkdir()
            write(place, texts)
            ours = nanothink_eval(options.checkpoint, place)
            exported = [
                "--model",
                "hf",
                "--model_args",
                f"pretrained={export},dtype=float32",
                "--device",
                "cpu",
            ]
            with served(options.checkpoint, length) as server:
                for how, model in ((name, exported), (f"{name}, served", server)):
                    theirs = lm_eval(program, model, place, options.batch)
                    ratios[how] = theirs / ours
                    print(f"| {how} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.4f} |", flush=True)
    if any(abs(ratios[how] - 1) > TOLERANCE for how in ("one text a domain", "one text a domain, served")):
        raise SystemExit(f"\nOne text a domain differs by more than {TOLERANCE:.1%}.")


if __name__ == "__main__":
    main()
