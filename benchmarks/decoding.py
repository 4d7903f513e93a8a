"""NanoThink: decoding with its caches against reading the text again, and against multi-head attention.

    python benchmarks/decoding.py

Three experts of the default shape, vocabulary 8,192, batch 1, float32; weights are random, which changes no
time. A step reads one token after a text of the given length; "again" reads that text in a parallel pass. The
last columns are one layer of attention alone, latent and multi-head, of the same width.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from side_by_side import machine, take_turns
from torch import Tensor

from nanothink.config import Config, TransformerConfig
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.latent_attention import LatentAttention, latent_widths
from nanothink.models.layers import Attention, Rotary

VOCABULARY = 8192
STEPS = 40  # tokens read one by one at each length
CALLS = 50  # of one layer, so that they are long enough to be timed


def model(context: int) -> LanguageModel:
    config = Config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"max_seq_len": context})})
    torch.manual_seed(0)
    parts = [ExpertDescription(kind, kind, config) for kind in EXPERTS]
    return build_model(COMBINED, config, VOCABULARY, parts).eval()


class Steps:
    """Reads one token more each time it is called."""

    def __init__(self, combined: LanguageModel, text: Tensor, length: int) -> None:
        self.combined, self.text, self.position = combined, text, length
        self.state = combined.start(1)
        combined.step(text[:, :length], self.state)

    def __call__(self) -> None:
        self.combined.step(self.text[:, self.position : self.position + 1], self.state)
        self.position += 1


def attention_step(
    attention: LatentAttention | Attention, rotary_width: int, length: int
) -> Callable[[], None]:
    """One token after ``length`` others, CALLS times; the cache stands still, so each overwrites the last."""
    rotary, width = Rotary(rotary_width, length + 1, 10_000.0), attention.o_proj.weight.shape[0]
    cache = KeyValueCache(1, 1, length + 1)
    attention(torch.randn(1, length, width), rotary(0, length), cache, 0)
    cache.advance(length)
    token, rotation = torch.randn(1, 1, width), rotary(length, 1)

    def call() -> None:
        for _ in range(CALLS):
            attention(token, rotation, cache, 0)

    return call


def median(side: dict[str, Callable[[], object]], rounds: int) -> float:
    """Seconds a call."""
    (seconds,) = take_turns(side, rounds).values()
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    combined = model(max(options.lengths) + STEPS)
    width, shape = combined.d_model, Config().mla
    head_dim, rope_dim, latent_dim = latent_widths(width, shape)
    latent = LatentAttention(width, shape.n_heads, head_dim, rope_dim, latent_dim)
    heads = Attention(width, TransformerConfig(n_heads=shape.n_heads))
    print(f"\n{machine()}, medians of {options.rounds} rounds\n")
    print("| tokens before | a step, with its caches | the text again | ratio | MLA step | multi-head step |")
    print("|---:|---:|---:|---:|---:|---:|")
    for length in options.lengths:
        text = torch.randint(VOCABULARY, (1, length + STEPS))
        with torch.inference_mode():
            again = median({"again": partial(combined.hidden, text[:, :length])}, options.rounds)
            mla = median({"latent": attention_step(latent, rope_dim, length)}, options.rounds) / CALLS
            multi = median({"heads": attention_step(heads, head_dim, length)}, options.rounds) / CALLS
            step = median({"step": Steps(combined, text, length)}, STEPS - 1)
        print(
            f"| {length:,} | {1e3 * step:.1f} ms | {1e3 * again:.0f} ms | {again / step:.0f} | "
            f"{1e3 * mla:.2f} ms | {1e3 * multi:.2f} ms |"
        )


if __name__ == "__main__":
    main()
