"""Weights of the gate that a model has where nothing can be fitted for it (models/joint_gate.py).

    python benchmarks/usual_gate.py checkpoints/nanothink_mla.pt --data-dir more

Fits a linear gate on text that the model has not seen, from features that every model has: those of its
prediction and of the memories. Once with the vector store, once without. Prints the rows of the table, and
bits per byte on each half of the text for weights fitted on the other.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

import nanothink
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import tokenise
from nanothink.inference.gated import Positions, Reading, positions
from nanothink.inference.generate import evaluating
from nanothink.models.joint_gate import MEMORIES, Evidence, JointGate, n_expert_features
from nanothink.training.gate_fitting import fit_linear, join, unigram_log_frequencies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="of a NanoThink with a vector store")
    parser.add_argument("--data-dir", type=Path, required=True, help="text that the model has not seen")
    parser.add_argument("--max-tokens", type=int, default=12_000, help="of each domain")
    options = parser.parse_args()
    loaded = nanothink.load(options.checkpoint)
    model, cache = loaded.model, loaded.config.document_cache
    length = loaded.config.model.max_seq_len
    reading = Reading(length, loaded.precision, cache.window_tokens, cache.n_neighbours)
    streams = tokenise(find_corpus(options.data_dir), loaded.tokenizer, split=None).train
    gate = model.joint_gate
    counted = unigram_log_frequencies(streams, model.vocab_size)
    unigram = counted if gate is None else gate.weights["unigram"]
    n_own = n_expert_features(len(model.expert_names)) - 4
    found, n_bytes = [], []
    with evaluating(model):
        for stream in streams.values():
            sample = stream.sample(options.max_tokens)
            found += list(positions(model, sample, MEMORIES, unigram, reading))
            n_bytes.append(sample.n_bytes)
    text = join(found)
    features = text.evidence.features[:, n_own:]
    for names in (MEMORIES, MEMORIES[1:]):
        memories = text.evidence.memories[-len(names) :]
        own = torch.cat([features[:, :4], features[:, -6 * len(names) :]], 1)
        own[:, 9::6] = 0.0  # emptiness: an empty memory has no share anyway
        part = replace(text, evidence=Evidence(own, memories))
        start = JointGate.start(names, own, unigram, n_hidden=0, generator=torch.Generator())
        if len(names) == 2:
            for m, column in enumerate((9, 15)):
                there = features[:, column] == 0  # the features of an empty memory are no measurement
                for weights, measured in (("mean", own[there].mean(0)), ("deviation", own[there].std(0))):
                    start.weights[weights][4 + 6 * m : 9 + 6 * m] = measured[4 + 6 * m : 9 + 6 * m]
            both = start
        else:
            columns = [0, 1, 2, 3, *range(10, 16)]
            for weights in ("mean", "deviation"):
                start.weights[weights][:] = both.weights[weights][columns]
        half = torch.arange(len(text.targets)) % 2 == 0
        for fitted, scored in ((half, ~half), (~half, half)):
            gate = fit_linear(rows(part, fitted), start, 0.0, 250, 0)
            nats = gate.mix(text.log_likelihood[scored], text.targets[scored], part.evidence.rows(scored))[0]
            print(names, f"{-float(nats.mean()) / math.log(2) * len(half) / sum(n_bytes):.4f} bits per byte")
        gate = fit_linear(part, start, 0.0, 250, 0)
        out, bias = gate.weights["out"], gate.weights["out_bias"]
        table = [gate.weights["mean"], gate.weights["deviation"], *(out[1:] - out[0])]
        print("temperature", gate.weights["log_temperature"].exp().tolist())
        print("bias", (bias[1:] - bias[0]).tolist())
        for row in zip(*table, strict=True):
            print("    (" + ", ".join(f"{float(value):.2f}" for value in row) + "),")


def rows(text: Positions, chosen: torch.Tensor) -> Positions:
    return Positions(
        text.documents[chosen.numpy()],
        text.targets[chosen],
        text.log_likelihood[chosen],
        text.evidence.rows(chosen),
    )


if __name__ == "__main__":
    main()
