"""The steps of all models: their forward passes for a few tokens, as programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nanothink.models.decoding import MAX_ROWS, new_program
from nanothink.models.decoding.program import Program
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.latent_attention import LatentAttention
from nanothink.models.layers import Attention, Block, RMSNorm
from nanothink.models.low_rank import AdaptedLinear, in_blocks

if TYPE_CHECKING:
    from nanothink.models.diffuser import Diffuser
    from nanothink.models.joint_decoding import JointDecoding
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

    def predict(self, tokens: Tensor, positions: Sequence[int], *, every: bool = False) -> Tensor:
        """The same -> logits after the last of them, (B, V), or after every one, (B T, V)."""
        assert self.logits is not None
        self.program.run(tokens, positions, every=every)
        return self.logits[: tokens.numel() if every else tokens.shape[0]].clone()


def decoder_step(decoder: Decoder, cache: KeyValueCache, n_new: int, head: Tensor | None) -> Step | None:
    """Read ``n_new`` more tokens at a time into a cache, and as many calls as its buffers have room for.

    Args:
        head: (V, D), for logits; None for states alone.

    Returns:
        None if the decoder has something that programs do not know.
    """
    program = new_program()
    states = _decoded(program, decoder, cache, n_new)
    return None if states is None else _finished(program, states, decoder.embed_tokens, head)


def _decoded(program: Program, decoder: Decoder, cache: KeyValueCache, n_new: int) -> Tensor | None:
    rotary, blocks = decoder.rotary, [cast(Block, block) for block in decoder.layers]
    if rotary is None or not _plain_floats(decoder) or not all(map(_known, blocks)):
        return None
    x = program.embed(decoder.embed_tokens.weight)
    for i, block in enumerate(blocks):
        attention = cast(Attention, block.self_attn)
        width = attention.head_dim
        keys, values = cache.room(i, n_new, attention.n_kv_heads, width, width)
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
        _feed_forward(program, _norm(program, x, block.post_attention_layernorm), block.mlp, x)
    return _norm(program, x, decoder.norm)


def state_space_step(backbone: Backbone, recurrence: Recurrence, head: Tensor | None) -> Step | None:
    """The same for the state-space model, which advances ``recurrence``."""
    layers = cast("list[Layer]", backbone.layers)
    if not _plain_floats(backbone) or any(layer.mixer.norm_eps is not None for layer in layers):
        return None
    program = new_program()
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
    return _finished(program, _norm(program, x, backbone.norm_f), backbone.embeddings, head)


def diffuser_step(model: Diffuser, cache: KeyValueCache, n_new: int, head: Tensor | None) -> Step | None:
    """The same for the diffuser: one evaluation of its denoiser, from the null noise."""
    program, denoiser = new_program(), model.denoiser
    encoded = _decoded(program, model.encoder, cache, n_new)
    if encoded is None or not _plain_floats(denoiser):
        return None
    x = program.linear(encoded, denoiser.context_proj.weight)
    of_row = program.linear(encoded, denoiser.context_modulation.weight)
    of_level, width = denoiser.level_terms(model.shape.training_steps), model.d_model
    for i, (norm, mlp) in enumerate(zip(denoiser.norms, denoiser.mlps, strict=True)):
        row, level = of_row[:, 3 * i * width :], of_level[3 * i * width :]
        inside = program.modulate(_norm(program, x, norm), row, level)
        y = _feed_forward(program, inside, mlp)
        program.add_gated(y, row[:, 2 * width :], level[2 * width :], x)
    return _finished(program, _norm(program, x, denoiser.norm), model.embedding, head)


@dataclass(frozen=True)
class JointStep(Step):
    """That of NanoThink, which reads the states of its experts beside the tokens."""

    experts: Tensor
    """(E, max_rows, D): where the experts' states are put."""
    weights: Tensor
    """(max_rows, E), the router's."""


def joint_step(
    model: JointDecoding, latents: KeyValueCache, n_new: int, head: Tensor | None
) -> JointStep | None:
    """The same for NanoThink over its experts."""
    own = [p for name, p in model.named_parameters() if not name.startswith("experts.")]
    if not all(p.dtype is torch.float32 and p.is_contiguous() for p in own):
        return None
    program, width = new_program(), model.d_model
    experts = torch.zeros(len(model.experts), MAX_ROWS, width)
    u = _norm(program, program.embed(model.embed_tokens.weight), model.embed_norm)
    for project, states in zip(cast("list[nn.Linear]", model.expert_projs), experts, strict=True):
        program.linear(states, project.weight, add_to=u)
    for i, block in enumerate(cast("list[Block]", model.layers)):
        attention = cast(LatentAttention, block.self_attn)
        n_heads, head_dim, latent = attention.n_heads, attention.head_dim, attention.latent_dim
        kept, keys = latents.room(i, n_new, 1, latent, attention.rope_dim)
        h = _norm(program, u, block.input_layernorm)
        q = program.linear(h, attention.q_proj.weight)
        program.rotate(q[:, head_dim:], model.rotary.cos, model.rotary.sin, head_dim + attention.rope_dim)
        both = program.linear(h, attention.kv_a_proj_with_mqa.weight)
        program.append(_norm(program, both[:, :latent], attention.kv_a_layernorm), kept)
        program.rotate(both[:, latent:], model.rotary.cos, model.rotary.sin, attention.rope_dim)
        program.append(both[:, latent:], keys)
        scale = (head_dim + attention.rope_dim) ** -0.5
        y = program.attend_latents(q, kept, keys, attention.kv_b_proj.weight, n_heads, scale)
        program.linear(y, attention.o_proj.weight, add_to=u)
        _feed_forward(program, _norm(program, u, block.post_attention_layernorm), block.mlp, u)
    u, router = _norm(program, u, model.norm), model.router
    weights, states = program.route(u, router.weight, router.bias, model.log_scale, experts)
    found = _finished(program, states, model.embed_tokens, head)
    return JointStep(**vars(found), experts=experts, weights=weights)


def _feed_forward(program: Program, x: Tensor, mlp: nn.Module, add_to: Tensor | None = None) -> Tensor:
    assert isinstance(mlp, SwiGLU)
    gate, up = program.linear(x, mlp.gate_proj.weight), program.linear(x, mlp.up_proj.weight)
    return program.linear(program.gate(gate, up), mlp.down_proj.weight, add_to=add_to)


def _finished(program: Program, states: Tensor, table: nn.Embedding, head: Tensor | None) -> Step:
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
    """True if programs can read the weights: float32, but for those of linear layers in bfloat16."""
    if any(isinstance(part, AdaptedLinear) for part in module.modules()):
        return False
    return all(
        p.is_contiguous() and (p.dtype is torch.float32 or (p.dtype is torch.bfloat16 and in_blocks(name)))
        for name, p in module.named_parameters()
    )
