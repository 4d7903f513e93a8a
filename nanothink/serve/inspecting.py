"""What a model predicts after a text, whom it trusts there, and the training text that it recalls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nanothink.inference.generate import evaluating, window_start
from nanothink.inference.scores import token_scores
from nanothink.models.decoding_states import JointState
from nanothink.models.document_cache import CachedState
from nanothink.models.nanothink import NanoThink
from nanothink.runs.store_commands import nearest_passages
from nanothink.runs.trained_model import TrainedModel
from nanothink.vector_store.contents import VectorStore


def inspect(
    loaded: TrainedModel, tokens: Sequence[int], *, n_likeliest: int, n_passages: int
) -> dict[str, Any]:
    """The prediction after ``tokens``, as a JSON object.

    Returns:
        ``likeliest``: tokens with text and probability. ``weights``: of a combined model's components.
        ``passages``: the nearest keys of its vector store, with what stands before them, file and line.
    """
    model, tokenizer = loaded.decoder, loaded.tokenizer
    text = list(tokens) or [tokenizer.start_id]
    window = text[window_start(len(text), model.context_length) :]
    with evaluating(model), torch.inference_mode():
        state = model.start(1)
        logits = model.step(torch.tensor([window], device=loaded.device), state)
    (score,) = token_scores(logits, [int(logits.argmax())], n_likeliest)
    found: dict[str, Any] = {
        "likeliest": [
            {"token": token, "text": tokenizer.decode([token]), "probability": math.exp(value)}
            for token, value in score.likeliest
        ],
        "weights": {},
        "passages": [],
    }
    if (weights := getattr(state, "weights", None)) is not None:
        found["weights"] = dict(zip(getattr(model, "components", ()), weights[0].tolist(), strict=True))
    combined, inner = loaded.model, state.rows[0].state if isinstance(state, CachedState) else state
    store = combined.vector_store if isinstance(combined, NanoThink) and n_passages else None
    gate = combined.store_gate if isinstance(combined, NanoThink) else None
    if isinstance(store, VectorStore) and gate is not None and isinstance(inner, JointState):
        assert inner.queries is not None
        temperature = float(gate.log_temperature.exp())
        query = inner.queries[:, -1].cpu().numpy()
        hits = nearest_passages(store, tokenizer, query, temperature, n_passages)
        found["passages"] = [asdict(hit) for hit in hits]
    return found
