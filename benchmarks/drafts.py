"""NanoThink's tokens a second with drafts (speculative decoding) against plain steps.

    python benchmarks/drafts.py checkpoints/nanothink_mla.pt
    python benchmarks/drafts.py --vocabulary 50257 --acceptance 0.6 0.7 0.8
    python benchmarks/drafts.py --vector-store

Whole calls of ``nanothink.inference.generate`` that take turns, one text at a time, one thread, processor
time; both sides must give the same tokens. A checkpoint says by itself how many drafts serve, without
memories, with its vector store, and with both. A preset's shape has random weights, whose own drafts mean
nothing: there each draft is made as ever, and then replaced by the right token with the probability that was
asked for, and by a wrong one else. ``--vector-store`` gives it random neighbours.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the nanothink command has it

import torch
from generation import DRAWN, EOS, model_of
from side_by_side import machine, ratios, take_turns
from torch import Tensor

import nanothink
from nanothink.config.run import resolve_config
from nanothink.errors import NanoThinkError
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import COMBINED
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding_states import JointState
from nanothink.models.drafts import no_drafts
from nanothink.models.joint_decoding import JointDecoding
from nanothink.models.nanothink import NanoThink
from nanothink.models.store_gate import Neighbours, StoreGate

PROMPTS = ("The first ", "def main(", "In the beginning ", "import os\n")
LAWS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "drawn": DRAWN}
Draft = Callable[..., list[int]]


class RandomNeighbours:
    """A vector store that finds nothing: 32 random tokens, in no time."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocabulary, (1, 32), generator=generator)

    def search(self, queries: Tensor) -> Neighbours:
        return Neighbours(
            torch.linspace(0.9, 0.5, 32).repeat(len(queries), 1), self.tokens.repeat(len(queries), 1)
        )


class Counted:
    """Counts the passes of a model and the tokens that were drafted for them."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.n_passes, self.n_drafts = draft, 0, 0

    def __call__(self, model: JointDecoding, *arguments: Any) -> list[int]:
        drafted = self.draft(model, *arguments)
        self.n_passes, self.n_drafts = self.n_passes + 1, self.n_drafts + len(drafted)
        return drafted


def replaced(draft: Draft, text: Sequence[int], acceptance: float, vocabulary: int) -> Draft:
    """Drafts of which a share is the token that the text has there."""
    chance = random.Random(0)

    def right_or_wrong(
        model: JointDecoding, token: int, n_tokens: int, state: JointState, choose: Any
    ) -> list[int]:
        first = state.latents.length + 1

        def replace(logits: Tensor, drafted: Sequence[int]) -> int | None:
            if choose(logits, drafted) is None:
                return None
            right = text[first + len(drafted)]
            return right if chance.random() < acceptance else (right + 1) % vocabulary

        return draft(model, token, n_tokens, state, replace)

    return right_or_wrong


def measure(
    name: str,
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: argparse.Namespace,
    acceptance: float | None = None,
) -> None:
    for how, law in LAWS.items():
        config = SamplingConfig(max_new_tokens=options.tokens, stop_at_eos=False, seed=1, **law)

        def call(config: SamplingConfig = config) -> list[list[int]]:
            return [generate(model, [list(prompt)], config, eos_id=EOS)[0] for prompt in prompts]

        def plain(call: Callable[[], list[list[int]]] = call) -> list[list[int]]:
            with no_drafts():
                return call()

        texts, own = plain(), JointDecoding.draft
        draft: Draft = own
        if acceptance is not None:
            draft = replaced(own, [*prompts[0], *texts[0]], acceptance, model.vocab_size)
        counted = Counted(draft)
        JointDecoding.draft = partialmethod(counted)  # type: ignore[method-assign, assignment]
        if call() != texts:
            raise SystemExit("the texts differ")
        counted.n_passes = counted.n_drafts = 0
        seconds = take_turns({"plain": plain, "drafts": call}, options.rounds, time.process_time)
        JointDecoding.draft = own  # type: ignore[method-assign]
        n_calls = options.rounds + 1  # one to warm up
        n_tokens = len(prompts) * options.tokens
        milliseconds = {side: 1e3 * statistics.median(s) / n_tokens for side, s in seconds.items()}
        found = ratios(seconds, "drafts", "plain")
        n_read = n_calls * (n_tokens - len(prompts))  # the last token of a text is not read
        drafts = f"{counted.n_drafts / counted.n_passes:.2f}" if counted.n_passes else "none"
        served = f"{(n_read - counted.n_passes) / counted.n_drafts:.0%}" if counted.n_drafts else ""
        print(
            f"| {name} | {how} | {drafts} | {served} "
            f"| {milliseconds['plain']:.2f} | {milliseconds['drafts']:.2f} "
            f"| {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |",
            flush=True,
        )


def measure_checkpoint(path: Path, options: argparse.Namespace) -> None:
    memories = {
        "alone": {"vector_store": False},
        "vector store": {},
        "both memories": {"document_cache": True},
    }
    for name, chosen in memories.items():
        try:
            loaded = nanothink.load(path, **chosen)  # type: ignore[arg-type]
        except NanoThinkError as error:
            print(f"{name}: {error}")
            continue
        prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
        measure(f"{path.stem}, {name}", loaded.decoder, prompts, options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.7])
    parser.add_argument("--vector-store", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"\n{options.tokens} new tokens, float32, processor time, {machine()}\n")
    print("| model | tokens | drafts a pass | of them served | plain, ms | drafts, ms | times as fast |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for path in options.checkpoints:
        measure_checkpoint(path, options)
    if options.checkpoints:
        return
    model = model_of(COMBINED, resolve_config(preset=options.preset).config, options.vocabulary)
    if options.vector_store:
        assert isinstance(model, NanoThink)
        model.store_gate, model.vector_store = StoreGate(model.d_model), RandomNeighbours(options.vocabulary)
    prompt = torch.randint(1, options.vocabulary, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    for acceptance in options.acceptance:
        memory = ", vector store" if options.vector_store else ""
        name = f"{options.preset}, {options.vocabulary:,}{memory}, acceptance {acceptance}"
        measure(name, model, [prompt], options, acceptance)


if __name__ == "__main__":
    main()
