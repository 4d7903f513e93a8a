"""Findings about this machine: ``nanothink doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

import nanothink
from nanothink.config import DataConfig, ModelConfig, TrainExpertConfig
from nanothink.data.hub import availability
from nanothink.models.native import find_compiler
from nanothink.models.precision import choose_device
from nanothink.models.selective_scan import RULE, choose_scan
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import install
from nanothink.training.matmul_speed import MatmulSpeed
from nanothink.training.matmul_types import choose_precision


def examine(device_name: str | None, checkpoint_dir: Path, reporter: Reporter = SILENT) -> dict[str, str]:
    """Findings by topic, each one a sentence a person can act on."""
    device = choose_device(device_name)
    reporter.progress("examining", 0, 3)
    precision = choose_precision(TrainExpertConfig(), ModelConfig(), device)
    reporter.progress("examining", 1, 3)
    scan = choose_scan(device.type)
    reporter.progress("examining", 2, 3)
    tokenizer = DataConfig().tokenizer
    where_from = availability(tokenizer)
    folder = checkpoint_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    findings = {
        "nanothink": nanothink.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": _describe(device),
        "precision": f"{precision.name}: {precision.reason}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "bfloat16 on this CPU": _bfloat16(),
        "C++ compiler": find_compiler()
        or "none (g++, c++ or clang++): state-space models train slower on a CPU. Install one: g++",
        "selective scan": f"{scan.name}: {scan.reason}. {RULE}",
        "tokenizer": f"{tokenizer}: {where_from}",
        "disk": f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free at {folder}"
        + ("" if os.access(folder, os.W_OK) else ", and not writable: choose another --checkpoint-dir"),
    }
    for package, purpose, extra in (
        ("pyarrow", "data import of parquet files", "parquet"),
        ("pypdfium2", "data import of HTML, Word, EPUB and PDF", "documents"),
        ("datasets", "data import of Hugging Face datasets", "datasets"),
        ("datasketch", "data inspect --near-duplicates", "near_duplicates"),
        ("tensorboardX", "tracker=tensorboard", "tensorboard"),
        ("trackio", "tracker=trackio", "trackio"),
        ("wandb", "tracker=wandb", "wandb"),
    ):
        found = importlib.util.find_spec(package) is not None
        findings[package] = (
            f"installed: {purpose}" if found else f"missing: {purpose} needs {install(f'nanothink[{extra}]')}"
        )
    return findings


def _bfloat16() -> str:
    """The figures that a run of the default preset goes by on this CPU."""
    speeds = MatmulSpeed.of(TrainExpertConfig(), ModelConfig())
    try:
        step, muon = speeds.of_step(torch.bfloat16), speeds.of_muon(torch.bfloat16)
    except RuntimeError as error:
        return f"none: {str(error).strip().partition(chr(10))[0]}"
    kept = f"kept in {step.kept.parent}" if step.kept else "not kept: no cache folder can be written to"
    return (
        f"{step.times:.2f} times the speed of float32 in a step's products at width {speeds.width}, "
        f"{muon.times:.2f} in Muon's ({kept})"
    )


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type == "cpu":
        return f"cpu: {torch.backends.cpu.get_cpu_capability()}; no CUDA device and no MPS found"
    return str(device)
