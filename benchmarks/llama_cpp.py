"""llama.cpp beside NanoThink: a model's weights as a GGUF file, continued through the xllamacpp wheel."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from nanothink.checkpoints.gguf_export import GgufModel, Quantization, write_gguf
from nanothink.data.encoding import Tokenizer
from nanothink.models.contract import LanguageModel
from nanothink.models.state_space import StateSpace, to_mamba_config
from nanothink.models.transformer import Transformer, to_qwen3_config


class LlamaCpp:
    """A call continues the prompt greedily, as ``generate`` does, and returns the tokens.

    Args:
        quantized: "f32" or "q8_0", the type of the weights in matrix products.
    """

    def __init__(
        self, model: LanguageModel, prompt: list[int], n_tokens: int, quantized: Quantization = "f32"
    ) -> None:
        import xllamacpp

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_weights(model, path, quantized)
            options = xllamacpp.CommonParams()
            options.model.path = str(path)
            options.n_ctx = 32 * -(-(len(prompt) + n_tokens + 1) // 32)
            options.n_parallel = 1
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
            options.verbosity = -1
            self._server = xllamacpp.Server(options)
        sampling = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        self._asked = {"prompt": prompt, "n_predict": n_tokens, "cache_prompt": False, **sampling}
        self.decoding: list[float] = []
        """Seconds of each call by its own clock, without the prompt and without what a call costs."""

    def __call__(self) -> list[list[int]]:
        answer: Any = self._server.handle_completions(self._asked)
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        self.decoding.append(answer["timings"]["predicted_ms"] / 1e3)
        return [[int(word) for word in answer["choices"][0]["text"].split("w")[1:]]]


class Words:
    """A vocabulary of made-up words, as no text is read: what a GGUF file takes from a tokenizer."""

    name, eos_id = "words", 0
    chat, bos_id, bos_token, special_ids = None, None, None, MappingProxyType[str, int]({})

    def __init__(self, size: int) -> None:
        self._vocabulary = {f"w{token}": token for token in range(size)}

    def to_state(self) -> dict[str, str]:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        bpe = {"type": "BPE", "vocab": self._vocabulary, "merges": ["w 1"]}  # llama.cpp wants at least one
        rules = {"model": bpe, "pre_tokenizer": byte_level, "normalizer": None, "added_tokens": []}
        return {"tokenizer_json": json.dumps(rules)}


def write_weights(model: LanguageModel, path: Path, quantized: Quantization) -> None:
    """Write a GGUF file."""
    if isinstance(model, Transformer):
        settings = {**to_qwen3_config(model), "model_type": "qwen3", "rope_theta": model.shape.rope_theta}
    else:
        assert isinstance(model, StateSpace)
        settings = {**to_mamba_config(model), "model_type": "mamba"}
    words = cast(Tokenizer, Words(model.vocab_size))
    whole = GgufModel("benchmark", settings, model.state_dict(), words, starts_with_eos=False)
    write_gguf(whole, path, quantization=quantized)
