"""Tokens a second of NanoThink's generation against ``transformers`` and llama.cpp.

    python benchmarks/generation.py --threads 1
    python benchmarks/generation.py --threads 1 --preset tiny --vocabulary 2048

Whole calls as a person makes them: ``nanothink.inference.generate`` here, ``model.generate`` there, a prompt
of 16 tokens and ``--tokens`` new ones, greedy and drawn (temperature 0.8, top-k 50), at each batch size,
float32. The transformer is compared with Qwen3 and the state-space model with Mamba of the very same weights,
and greedy tokens are checked to be equal first; GPT-2 has the same depth and width. llama.cpp has these
weights too and continues one prompt greedily, by the clock of the calls and by its own, which leaves the
prompt out. "no compiler" is NanoThink where there is none. The diffuser and NanoThink have no counterpart.
Shapes are the preset's, weights random. ``--device cuda`` measures the same on a GPU, where ``--batch 1 64``
says more. On a machine that is busy with other work, ``--cpu-time`` counts the processor's time alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the nanothink command has it

import torch
from llama_cpp import LlamaCpp
from side_by_side import machine, ratios, take_turns
from torch import nn

from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding import steps_by
from nanothink.models.decoding.large_pages import lay_together
from nanothink.models.state_space import StateSpace, to_mamba_config
from nanothink.models.transformer import Transformer, to_qwen3_config

PROMPT, EOS = 16, 0
DRAWN = {"temperature": 0.8, "top_k": 50}
Call = Callable[[], list[list[int]]]


def model_of(kind: str, config: Config, vocabulary: int) -> LanguageModel:
    torch.manual_seed(0)
    parts = [ExpertDescription(k, k, config) for k in EXPERTS] if kind == COMBINED else []
    model = build_model(kind, config, vocabulary, parts).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    lay_together(model)  # as ``nanothink.load`` does
    return model


def counterparts(model: LanguageModel) -> dict[str, Any]:
    """Models of transformers to stand beside this one; the first has its weights."""
    if isinstance(model, Transformer):
        from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

        qwen3 = Qwen3ForCausalLM(Qwen3Config(**to_qwen3_config(model)))
        qwen3.load_state_dict(model.state_dict(), strict=False)
        qwen3.tie_weights()
        shape = {"n_embd": model.d_model, "n_layer": model.shape.n_layers, "n_head": model.shape.n_heads}
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=model.vocab_size, n_positions=model.context_length, **shape)
        )
        return {"Qwen3, transformers": qwen3.eval(), "GPT-2, transformers": gpt2.eval()}
    if isinstance(model, StateSpace):
        from transformers import MambaConfig, MambaForCausalLM

        mamba = MambaForCausalLM(MambaConfig(**to_mamba_config(model)))
        mamba.load_state_dict(model.state_dict(), strict=False)
        mamba.tie_weights()
        return {"Mamba, transformers": mamba.eval()}
    return {}


def ours(model: LanguageModel, prompts: torch.Tensor, n_tokens: int, drawn: bool) -> Call:
    sampling = {**DRAWN, "seed": 1} if drawn else {"temperature": 0.0}
    config = SamplingConfig(max_new_tokens=n_tokens, stop_at_eos=False, **sampling)
    texts = prompts.tolist()
    # The tokens are on the CPU: nothing to wait for.
    return lambda: generate(model, texts, config, eos_id=EOS)


def without_compiler(call: Call) -> Call:
    def plain() -> list[list[int]]:
        with steps_by("plain"):
            return call()

    return plain


def theirs(model: Any, prompts: torch.Tensor, n_tokens: int, drawn: bool) -> Call:
    sampling: dict[str, Any] = {"do_sample": True, **DRAWN} if drawn else {"do_sample": False}

    def call() -> list[list[int]]:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n_tokens,
            eos_token_id=None,  # no text ends early
            pad_token_id=EOS,
            use_cache=True,
            **sampling,
        )
        return [row[prompts.shape[1] :] for row in found.tolist()]

    return call


def measure(kind: str, config: Config, options: argparse.Namespace) -> None:
    model = model_of(kind, config, options.vocabulary)
    beside = {name: found.to(options.device) for name, found in counterparts(model).items()}
    model.to(options.device)
    for batch in options.batch:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1, options.vocabulary, (batch, PROMPT), generator=generator).to(
            options.device
        )
        for drawn in (False, True):
            name = f"nanothink, {kind}"
            calls = {name: ours(model, prompts, options.tokens, drawn)}
            if options.device == "cpu":
                calls[f"{name}, no compiler"] = without_compiler(calls[name])
            calls |= {peer: theirs(found, prompts, options.tokens, drawn) for peer, found in beside.items()}
            others = {}
            if beside and batch == 1 and not drawn and options.device == "cpu":
                prompt = prompts[0].tolist()
                others = {q: LlamaCpp(model, prompt, options.tokens, q) for q in options.llama_cpp}
                calls |= {f"llama.cpp, {q}": other for q, other in others.items()}
            if beside and not drawn:
                agree(calls[name](), calls[next(iter(beside))]())
            if "f32" in others:
                agree(calls[name](), others["f32"]())
            seconds = take_turns(
                calls, options.rounds, time.process_time if options.cpu_time else time.perf_counter
            )
            for q, other in others.items() if not options.cpu_time else ():
                seconds[f"llama.cpp, {q}, its own clock"] = other.decoding[-options.rounds :]
            for side, values in seconds.items():
                speed = batch * options.tokens / statistics.median(values)
                ratio = ""
                if side != name:
                    found = ratios(seconds, name, side)
                    ratio = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
                how = "drawn" if drawn else "greedy"
                print(f"| {side} | {batch} | {how} | {speed:,.0f} | {ratio} |", flush=True)


def agree(ours: list[list[int]], same_weights: list[list[int]]) -> None:
    """Greedy text of equal weights is equal, but where rounding decides between two tokens."""
    for mine, its in zip(ours, same_weights, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b), len(mine))
        if shared < min(8, len(mine)):
            raise SystemExit(f"not the same model: {mine[:10]} against {its[:10]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = (*EXPERTS, COMBINED)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--llama-cpp", nargs="*", choices=("f32", "q8_0"), default=["f32"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = resolve_config(preset=options.preset).config
    print(f"\n{options.tokens} new tokens after {PROMPT}, float32, {machine(options.device)}\n")
    print("| side | batch | tokens | tokens/s (median) | nanothink against it (min to max) |")
    print("|---|---:|---|---:|---:|")
    for kind in options.kinds:
        measure(kind, config, options)


if __name__ == "__main__":
    main()
