"""The steps of the transformer and the state-space model: their forward passes as programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nanothink.models.decoding import MAX_ROWS, compiled
from nanothink.models.decoding.program import Program
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.layers import Attention, Block, RMSNorm

if TYPE_CHECKING:
    from nanothink.models.mamba_mixer import Recurrence
    from nanothink.models.state_space import Backbone, Layer
    from nanothink.models.transformer import Decoder

_BLOCK = {
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
_QK_NORM = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


@dataclass(frozen=True)
class Step:
    """A program that reads new tokens, for one decoding state of one model."""

    program: Program
    states: Tensor
    """(max_rows, D): the final states of the tokens."""
    logits: Tensor | None
    """(max_rows, V): of the last token of each sequence; None where there is no head."""
    n_before_head: int
    """Operations that give the states."""
    address: int
    """Data pointer of the embedding table, which changes when a model is moved or converted."""

    def read(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """(B, T) new tokens, the first of each row at its position -> their states, (B, T, D)."""
        self.program.run(tokens, positions, self.n_before_head)
        return self.states[: tokens.numel()].clone().view(*tokens.shape, -1)

    def predict(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """The same -> logits after the last of them, (B, V)."""
        assert self.logits is not None
        self.program.run(tokens, positions)
        return self.logits[: tokens.shape[0]].clone()


def decoder_step(decoder: Decoder, cache: KeyValueCache, n_new: int, head: Tensor | None) -> Step | None:
    """Read ``n_new`` more tokens at a time into a cache, and as many calls as its buffers have room for.

    Args:
        head: (V, D), for logits; None for states alone.

    Returns:
        None if the decoder has something that programs do not know.
    """
    blocks = [cast(Block, block) for block in decoder.layers]
    rotary, norm = decoder.rotary, decoder.norm
    if rotary is None or not all(map(_known, blocks)) or not _plain_floats(decoder):
        return None
    if (
        2 * rotary.cos.shape[1] != cast(Attention, blocks[0].self_attn).head_dim
    ):  # a part of each head rotates
        return None
    assert isinstance(norm, RMSNorm)
    program = Program(compiled.library(), MAX_ROWS)
    x = program.embed(decoder.embed_tokens.weight)
    for i, block in enumerate(blocks):
        attention, mlp = cast(Attention, block.self_attn), cast(SwiGLU, block.mlp)
        width = attention.q_proj.weight.shape[0] // attention.n_heads
        keys, values = cache.room(i, n_new, attention.k_proj.weight.shape[0] // width, width)
        h = _norm(program, x, block.input_layernorm)
        q, k = program.linear(h, attention.q_proj.weight), program.linear(h, attention.k_proj.weight)
        for rows, of_head in ((q, attention.q_norm), (k, attention.k_norm)):
            if of_head is not None:
                _norm(program, rows, of_head, in_place=True)
            program.rotate(rows, rotary.cos, rotary.sin, width)
        program.append(k, keys)
        program.append(program.linear(h, attention.v_proj.weight), values)
        y = program.attend(q, keys, values, width**-0.5)
        program.linear(y, attention.o_proj.weight, add_to=x)
        h = _norm(program, x, block.post_attention_layernorm)
        gate, up = program.linear(h, mlp.gate_proj.weight), program.linear(h, mlp.up_proj.weight)
        program.linear(program.gate(gate, up), mlp.down_proj.weight, add_to=x)
    return _finished(program, x, norm, decoder.embed_tokens, head)


def state_space_step(backbone: Backbone, recurrence: Recurrence, head: Tensor | None) -> Step | None:
    """The same for the state-space model, which advances ``recurrence``."""
    layers = cast("list[Layer]", backbone.layers)
    if not _plain_floats(backbone) or any(layer.mixer.norm_eps is not None for layer in layers):
        return None
    program = Program(compiled.library(), MAX_ROWS)
    x = program.embed(backbone.embeddings.weight)
    for i, layer in enumerate(layers):
        mixer = layer.mixer
        state, channels = recurrence.of(i, mixer), len(mixer.D)
        h = _norm(program, x, layer.norm)
        inner = program.linear(h, mixer.in_proj.weight[:channels])
        gate = program.linear(h, mixer.in_proj.weight[channels:])
        u = program.convolve(inner, mixer.conv1d.taps(), mixer.conv1d.bias, state.conv_state)
        parts = program.linear(u, mixer.x_proj.weight)  # Δ of low rank, B, C
        delta = program.spread(parts, mixer.dt_proj.weight.t().contiguous(), mixer.dt_proj.bias)
        rates = (mixer.rates() / math.log(2)).t().contiguous()
        y = program.scan(u, delta, parts, mixer.splits[0], rates, mixer.D, state.ssm_state)
        program.linear(program.gate(gate, y), mixer.out_proj.weight, add_to=x)
    return _finished(program, x, backbone.norm_f, backbone.embeddings, head)


def _finished(program: Program, x: Tensor, norm: RMSNorm, table: nn.Embedding, head: Tensor | None) -> Step:
    states = _norm(program, x, norm)
    count = len(program)
    logits = None if head is None else program.linear(states, head, last=True)
    return Step(program, states, logits, count, table.weight.data_ptr())


def _norm(program: Program, x: Tensor, norm: nn.Module, *, in_place: bool = False) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return program.norm(x, norm.weight, norm.eps, in_place=in_place)


def _known(block: Block) -> bool:
    names = {name for name, _ in block.named_parameters()}
    return (
        names - _QK_NORM == _BLOCK
        and type(block.self_attn) is Attention
        and type(block.mlp) is SwiGLU
        and type(block.input_layernorm) is RMSNorm
        and not block.parallel
    )


def _plain_floats(module: nn.Module) -> bool:
    return all(p.dtype is torch.float32 and p.is_contiguous() for p in module.parameters())
