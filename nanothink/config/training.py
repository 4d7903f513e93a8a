"""Settings of training: one class per phase, with the same fields and other defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nanothink.config.base import Settings


class TrainConfig(Settings):
    """Settings of every phase. The phases differ in defaults, not in meaning."""

    section: ClassVar[str]
    """Name of the section that holds this phase's settings."""

    lr: float = Field(3e-4, gt=0, le=10)
    """Peak learning rate. Every parameter group has this rate times its own multiplier below."""

    lr_matrices: float = Field(20.0, ge=0)
    """Multiplier of lr for hidden matrices (with Muon, whose update is scaled to AdamW's RMS)."""

    lr_embeddings: float = Field(300.0, ge=0)
    """Multiplier of lr for token embeddings (AdamW)."""

    lr_head: float = Field(30.0, ge=0)
    """Multiplier of lr for the LM head (AdamW)."""

    lr_other: float = Field(30.0, ge=0)
    """Multiplier of lr for norms, biases, convolutions and everything else (AdamW)."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """'muon': Muon for hidden matrices, AdamW for the rest. 'adamw': AdamW for all."""

    weight_decay: float = Field(0.01, ge=0, le=1)
    """Decoupled weight decay of hidden matrices, per unit of their learning rate."""

    weight_decay_tables: float = Field(0.0, ge=0, le=1)
    """The same of token embeddings and LM head, per unit of the matrices' learning rate too, so that equal
    settings shrink all of them alike."""

    dropout: float = Field(0.0, ge=0, le=0.9)
    """Fraction of the features zeroed in training: of the embedding, of each layer's addition to the stream,
    and of the final state."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum."""

    fit_to_text: bool = False
    """Choose width, layers, dropout, weight_decay_tables, max_epochs and early_stopping_patience by the
    number of training tokens, where they are not set by hand."""

    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """Shape of the learning rate after warm-up: cosine to lr_min_fraction, or flat and then linear."""

    lr_min_fraction: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end of the schedule, as a fraction of the peak."""

    warmup_steps: int = Field(100, ge=0)
    """Optimizer steps of linear warm-up. A run shorter than ten times this
    warms up over a tenth of itself."""

    batch_size: int = Field(32, ge=1)
    """Blocks per forward and backward pass."""

    grad_accum_steps: int = Field(1, ge=1)
    """Forward and backward passes per optimizer step."""

    grad_clip: float = Field(1.0, gt=0)
    """Largest allowed norm of the gradient, over all parameters together."""

    max_epochs: int = Field(20, ge=1)
    """Passes over the training blocks."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps at which to stop, whatever the epoch; the schedule ends there too."""

    use_amp: bool = True
    """Compute matrix products in a 16-bit type where that is faster on this device."""

    amp_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type under use_amp; 'auto' picks the faster one, on a CPU by a measurement. A name is obeyed."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model's blocks by torch.compile for training: 'auto' on CUDA, where the first steps take
    longer for it. Checkpoints are the same."""

    recompute_activations: bool = False
    """Keep the input of each block alone and compute the block again in the backward pass (activation
    checkpointing): a fraction of the memory for about a third more time. The result is the same."""

    muon_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type of Muon's Newton-Schulz steps; 'auto': that of the other products, but float32 on a CPU where
    that is faster."""

    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate this often as well as at every epoch's end; when empty, ten times in a run of few epochs."""

    eval_max_tokens: int | None = Field(None, ge=1)
    """Validate on a sample of whole documents, at most this many tokens per domain; on all when empty."""

    early_stopping_patience: int = Field(5, ge=1)
    """Evaluations in a row without improvement after which training stops."""

    snapshot_every_epochs: int = Field(5, ge=1)
    """Keep a checkpoint every this many epochs."""

    save_every_seconds: float = Field(180.0, gt=0)
    """Rewrite the rolling checkpoint this often within an epoch."""

    log_every_steps: int = Field(10, ge=1)
    """Log training metrics this often, in optimizer steps."""

    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Copy of the numbers of metrics.jsonl: TensorBoard events beside it, trackio (on this machine), or
    wandb."""

    max_skipped_steps: int = Field(20, ge=1)
    """Non-finite steps in a row after which training gives up."""

    sample_prompts: tuple[str, ...] | None = None
    """Prompts continued at every evaluation, to watch the text improve; when empty, the first words of a
    held-out text of each domain, of three at most."""

    sample_tokens: int = Field(48, ge=0)
    """Tokens per sample; 0 writes none."""

    seed: int = Field(42, ge=0, lt=1 << 63)
    """Seed of initial weights and of the order of the data (the split has a fixed seed of its own)."""


class TrainExpertConfig(TrainConfig):
    """Phase 1, transformer and state-space expert."""

    section: ClassVar[str] = "train_expert"

    lora_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of this rank on the frozen model that the run starts from (--init); the whole
    model when empty."""

    lora_alpha: float | None = Field(None, gt=0)
    """An adapter's addition is scaled by lora_alpha / lora_rank; twice the rank when empty."""

    lr_adapters: float = Field(10.0, ge=0)
    """Multiplier of lr for low-rank adapters (AdamW)."""

    @property
    def lora_scale(self) -> float:
        """Factor on an adapter's addition."""
        if self.lora_rank is None or self.lora_alpha is None:
            return 2.0
        return self.lora_alpha / self.lora_rank

    @model_validator(mode="after")
    def _alpha_needs_a_rank(self) -> TrainExpertConfig:
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                "train_expert.lora_alpha scales low-rank adapters; give their rank too: --lora R"
            )
        return self


class TrainDiffuserConfig(TrainConfig):
    """Phase 1, diffuser: a third of the other experts' ``lr``, with multipliers that make up for it."""

    section: ClassVar[str] = "train_diffuser"

    lr: float = Field(1e-4, gt=0, le=10)
    """Peak learning rate. Every parameter group has this rate times its own multiplier below."""

    lr_matrices: float = Field(60.0, ge=0)
    """Multiplier of lr for hidden matrices (with Muon, whose update is scaled to AdamW's RMS)."""

    lr_embeddings: float = Field(900.0, ge=0)
    """Multiplier of lr for token embeddings (AdamW)."""

    lr_head: float = Field(90.0, ge=0)
    """Multiplier of lr for the LM head (AdamW)."""

    lr_other: float = Field(90.0, ge=0)
    """Multiplier of lr for norms, biases, convolutions and everything else (AdamW)."""

    batch_size: int = Field(64, ge=1)
    """Blocks per forward and backward pass."""


class TrainMLAConfig(TrainConfig):
    """Phase 2: NanoThink over frozen experts."""

    section: ClassVar[str] = "train_mla"

    lr: float = Field(1e-4, gt=0, le=10)
    """Peak learning rate. Every parameter group has this rate times its own multiplier below."""

    lr_matrices: float = Field(40.0, ge=0)
    """Multiplier of lr for hidden matrices (with Muon, whose update is scaled to AdamW's RMS)."""

    lr_embeddings: float = Field(300.0, ge=0)
    """Multiplier of lr for token embeddings (AdamW)."""

    lr_head: float = Field(30.0, ge=0)
    """Multiplier of lr for the LM head, which starts as the experts' heads (AdamW)."""

    lr_other: float = Field(40.0, ge=0)
    """Multiplier of lr for norms, router and everything else (AdamW)."""

    batch_size: int = Field(16, ge=1)
    """Blocks per forward and backward pass."""

    grad_accum_steps: int = Field(4, ge=1)
    """Forward and backward passes per optimizer step."""

    max_epochs: int = Field(30, ge=1)
    """Passes over the training blocks."""

    fit: Literal["auto", "gate", "full"] = "auto"
    """'full' trains embeddings, MLA, router and head on the training text. 'gate' fits a weight for each
    expert and the joint gate on held-out text, in seconds. 'auto' takes 'gate' where the experts know their
    training text better than other text and no max_steps are set."""

    entropy_reg: float = Field(0.01, ge=0)
    """Weight of log E - H(w) in the loss: what the routing weights lack to being equal."""

    states_disk_gb: float = Field(4.0, ge=0)
    """GB on the disk, beside the tokens, for the experts' states over the training blocks, which then are
    computed once and not in every epoch (on a CPU, if all of them fit). The result is the same. 0 keeps
    none."""


class DistillationConfig(Settings):
    """Learning from a teacher, ``pretrain --teacher``, beside the settings of ``train_expert``."""

    top_k: int = Field(64, ge=1, le=1024)
    """Likeliest tokens of the teacher at each position that are kept; all others count as one."""

    weight: float = Field(1.0, ge=0, le=1)
    """Share of the divergence from the teacher in the loss; the rest is cross-entropy of the text."""

    versions: int = Field(4, ge=1, le=64)
    """Versions of the training text: itself, and others in which the teacher has drawn a part of the tokens
    anew. Each pass over a domain reads the next one."""

    written_fraction: float = Field(0.0, ge=0, le=0.95)
    """Share of the training blocks that the teacher writes, once for all epochs. None: in the measurements of
    docs/log.md versions of the text gave as much for less time."""
