"""Students of a NanoThink: how much of its gain they keep, and what its vector store would give away.

    python benchmarks/distillation.py students --data-dir DATA --other more
                                        a student of each setting, scored on other text
    python benchmarks/distillation.py leak --data-dir DATA
                                        the teacher on its training text, with and without its own document in
                                        the store, and by the number of likeliest tokens that are kept

``students`` trains what is not in ``--out`` yet, through the commands that a person would type: the preset
auto, but for ``--set``. The gain is that over the best of the models of ``--single``, which should be as
carefully trained. The text of ``--other`` should be new to all of them; what was trained on is scored all the
same. Seconds are those of the processor, with the teacher's targets that were not on the disk yet.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import call

from nanothink.config.run import flatten, resolve_config
from nanothink.runs.preparing import prepare
from nanothink.runs.resuming import RunSpec
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.teacher import TEACHER
from nanothink.runs.teaching import Teacher, Teaching

VARIANTS: dict[str, dict[str, Any]] = {
    "text": {"distillation.versions": 1},
    "versions of the text": {},
    "versions, half weight": {"distillation.weight": 0.5},
    "versions and written": {"distillation.written_fraction": 0.5},
}
KEPT = (8, 16, 32, 64, 128)  # likeliest tokens
MOST_BLOCKS = 32


def bits_per_byte(checkpoint: Path, other: Path) -> float:
    where = ("--split", "all", "--allow-seen")
    (found,) = call("eval", checkpoint, "--data-dir", other, *where)["checkpoints"]
    return float(found["overall"]["bits_per_byte"])


def students(options: argparse.Namespace) -> None:
    scores = {path: bits_per_byte(path, options.other) for path in (*options.single, options.teacher)}
    teacher, single = scores.pop(options.teacher), min(scores, key=lambda path: scores[path])
    kind, best = options.kind or SavedModel.read(single).kind, scores[single]
    print(f"The best of {len(scores)} single models is {single}.\n")
    print("| | seconds | bits per byte | of the gain |\n|---|---:|---:|---:|")
    print(f"| single model | | {best:.4f} | 0 % |\n| its teacher | | {teacher:.4f} | 100 % |")
    for variant in options.variants:
        name = f"{kind}_{variant.replace(',', '').replace(' ', '_')}"
        checkpoint, seconds = options.out / f"{name}_expert.pt", ""
        if not checkpoint.exists():
            which = ["pretrain", kind, "--teacher", options.teacher, "--name", name, "--preset", "auto"]
            where = ["--data-dir", options.data_dir, "--checkpoint-dir", options.out]
            settings = [f"{name}={value}" for name, value in VARIANTS[variant].items()]
            asked = [part for assignment in [*settings, *options.set] for part in ("--set", assignment)]
            before = time.process_time()
            call(*which, *where, *asked)
            seconds = f"{time.process_time() - before:.0f}"
        found = bits_per_byte(checkpoint, options.other)
        kept = 100 * (best - found) / (best - teacher)
        print(f"| {variant} | {seconds} | {found:.4f} | {kept:.0f} % |", flush=True)


def leak(options: argparse.Namespace) -> None:
    saved = SavedModel.read(options.teacher)
    shape = {name: value for name, value in flatten(saved.config).items() if name.startswith("model.")}
    assignments = [f"{name}={value}" for name, value in shape.items()]
    assignments += [f"data.data_dir={options.data_dir}", "transformer.n_heads=1"]
    spec = RunSpec("transformer", options.out, teacher=options.teacher)
    setup = prepare(spec, lambda base: resolve_config(base=base, assignments=assignments))
    teaching, vocabulary = Teaching.of(setup), setup.tokenizer.vocab_size
    teacher = Teacher.open(setup.parts[TEACHER], setup.precision)
    numbers = np.linspace(0, setup.batches.n_blocks - 1, min(MOST_BLOCKS, setup.batches.n_blocks)).astype(int)
    texts, own = zip(*(teaching.corpus_group(range(n, n + 1)) for n in numbers), strict=True)
    inputs, targets = torch.cat(texts)[:, :-1], torch.cat(texts)[:, 1:, None]
    keys = np.concatenate(own)
    for name, documents in (("left out", keys), ("in the store", np.zeros_like(keys))):
        found = teacher.predict(inputs, documents, vocabulary)
        likelihood = (found.probabilities * (found.tokens == targets)).sum(-1)
        print(f"own document {name:<14} {-likelihood.log().mean():.3f} nats a token")
        if documents is keys:
            left = {k: 1 - found.probabilities[..., :k].sum(-1).mean() for k in KEPT if k < vocabulary}
    print("probability outside the K likeliest: " + ", ".join(f"{k}: {p:.2f}" for k, p in left.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("students", "leak"))
    parser.add_argument("--teacher", type=Path, default=Path("checkpoints/nanothink_mla.pt"))
    singles = [Path(f"checkpoints/{kind}_expert.pt") for kind in ("transformer", "state_space")]
    parser.add_argument("--single", type=Path, nargs="+", default=singles)
    parser.add_argument(
        "--kind", choices=("transformer", "state_space"), help="default: that of the best one"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--out", type=Path, default=Path("distilled"))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    if options.what == "students":
        students(options)
    else:
        leak(options)


if __name__ == "__main__":
    main()
