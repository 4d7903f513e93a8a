"""Names that other programs give to our settings, for advice on a name that is unknown here.

From the Trainer of transformers, nanoGPT, LitGPT and torchtitan.
"""

from __future__ import annotations

_NAMES = {
    "lr": ("lr", "learning_rate", "max_lr", "peak_lr", "learningrate"),
    "lr_min_fraction": ("min_lr", "min_lr_ratio", "lr_min"),
    "batch_size": (
        *("batch", "bs", "batchsize", "micro_batch_size", "device_batch_size", "local_batch_size"),
        *("per_device_train_batch_size", "train_batch_size", "global_batch_size"),
    ),
    "grad_accum_steps": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "grad_clip": ("max_grad_norm", "max_norm", "clip_grad_norm", "gradient_clip_val", "clip"),
    "max_epochs": ("epochs", "epoch", "num_epochs", "num_train_epochs", "n_epochs"),
    "max_steps": (
        "steps",
        "max_iters",
        "iters",
        "num_iterations",
        "num_steps",
        "max_iterations",
        "train_steps",
    ),
    "warmup_steps": ("warmup", "warmup_iters", "lr_warmup_steps", "warm_up_steps"),
    "schedule": ("lr_scheduler_type", "scheduler", "lr_scheduler", "decay_lr", "lr_schedule"),
    "weight_decay": ("wd", "decay", "weightdecay"),
    "betas": ("beta1", "beta2", "adam_beta1", "adam_beta2"),
    "optimizer": ("optim", "optimiser"),
    "eval_every_steps": ("eval_interval", "eval_steps", "eval_every", "eval_freq"),
    "log_every_steps": ("log_interval", "logging_steps", "log_freq", "log_every"),
    "snapshot_every_epochs": ("save_steps", "save_interval", "save_every", "checkpoint_interval"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "amp_dtype": ("dtype", "precision", "bf16", "fp16", "mixed_precision"),
    "tracker": ("report_to", "logger", "wandb", "wandb_log"),
    "recompute_activations": ("gradient_checkpointing", "activation_checkpointing"),
}
"""Names that other programs give each setting of training."""

_ELSEWHERE = {
    "model.max_seq_len": (
        *("block_size", "context_length", "context", "seq_len", "sequence_length", "max_length", "n_ctx"),
        *("max_position_embeddings", "n_positions", "ctx_len"),
    ),
    "model.d_model": ("n_embd", "hidden_size", "dim", "embed_dim", "width", "n_embed"),
    "transformer.n_layers": ("n_layer", "layers", "num_layers", "num_hidden_layers", "depth"),
    "transformer.n_heads": ("n_head", "heads", "num_heads", "num_attention_heads"),
    "data.tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_dir"),
    "data.data_dir": ("data", "dataset", "data_path", "train_file", "dataset_name"),
    "data.val_split": ("val_fraction", "validation_split", "eval_split", "val_ratio"),
}


def setting_meant(name: str, section: str = "train_expert") -> str:
    """The setting that is called ``name`` elsewhere; an empty string if it is unknown.

    ``section`` holds the settings of training.
    """
    word = name.replace("-", "_").lower()
    for setting, names in _NAMES.items():
        if word == setting or word in names:
            return f"{section}.{setting}"
    return next((full for full, names in _ELSEWHERE.items() if word in names), "")
