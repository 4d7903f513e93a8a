"""Tokens a second of NanoThink's generation against ``transformers``' ``generate`` with its cache.

    python benchmarks/generation.py --threads 1

Whole calls as a person makes them: ``nanothink.inference.generate`` here, ``model.generate`` there, a prompt
of 16 tokens and ``--tokens`` new ones, greedy and drawn (temperature 0.8, top-k 50), at each batch size,
float32. The transformer is compared with Qwen3 and the state-space model with Mamba of the very same weights,
and greedy tokens are checked to be equal first; GPT-2 has the same depth and width. The diffuser and
NanoThink have no counterpart and stand alone. Shapes are those of the default preset, vocabulary 8,192,
weights random. ``--device cuda`` measures the same on a GPU, where ``--batch 1 64`` says more.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from side_by_side import machine, ratios, take_turns
from torch import nn

from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.state_space import StateSpace, to_mamba_config
from nanothink.models.transformer import Transformer, to_qwen3_config

VOCABULARY, PROMPT, EOS = 8192, 16, 0
DRAWN = {"temperature": 0.8, "top_k": 50}
Call = Callable[[], list[list[int]]]


def model_of(kind: str, config: Config) -> LanguageModel:
    torch.manual_seed(0)
    parts = [ExpertDescription(k, k, config) for k in EXPERTS] if kind == COMBINED else []
    model = build_model(kind, config, VOCABULARY, parts).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def counterparts(model: LanguageModel) -> dict[str, Any]:
    """Models of transformers to stand beside this one; the first has its weights."""
    if isinstance(model, Transformer):
        from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

        qwen3 = Qwen3ForCausalLM(Qwen3Config(**to_qwen3_config(model)))
        qwen3.load_state_dict(model.state_dict(), strict=False)
        qwen3.tie_weights()
        shape = {"n_embd": model.d_model, "n_layer": model.shape.n_layers, "n_head": model.shape.n_heads}
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=model.context_length, **shape))
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
    return lambda: generate(
        model, texts, config, eos_id=EOS
    )  # the tokens are on the CPU: nothing to wait for


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
    model = model_of(kind, config)
    beside = {name: found.to(options.device) for name, found in counterparts(model).items()}
    model.to(options.device)
    for batch in options.batch:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=generator).to(options.device)
        for drawn in (False, True):
            name = f"nanothink, {kind}"
            calls = {name: ours(model, prompts, options.tokens, drawn)}
            calls |= {peer: theirs(found, prompts, options.tokens, drawn) for peer, found in beside.items()}
            if beside and not drawn:
                _, same = list(calls.values())[:2]
                agree(calls[name](), same())
            seconds = take_turns(calls, options.rounds)
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
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
