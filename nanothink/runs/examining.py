"""What a machine has to offer. Behind ``nanothink doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

import nanothink
from nanothink.config import TrainExpertConfig
from nanothink.models.precision import bfloat16_gain, choose_device, choose_precision
from nanothink.models.selective_scan import RULE, choose_scan


def examine(device_name: str | None, checkpoint_dir: Path) -> dict[str, str]:
    """Findings by topic, each one a sentence a person can act on."""
    device = choose_device(device_name)
    precision = choose_precision(TrainExpertConfig(), device)
    scan = choose_scan(device.type)
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
        "bfloat16 on this CPU": f"{bfloat16_gain():.2f} times the speed of float32",
        "selective scan": f"{scan.name}: {scan.reason}. {RULE}",
        "disk": f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free at {folder}"
        + ("" if os.access(folder, os.W_OK) else ", and not writable: choose another --checkpoint-dir"),
        "Hugging Face Hub": "offline (HF_HUB_OFFLINE is set)"
        if os.environ.get("HF_HUB_OFFLINE")
        else "used when reachable",
    }
    for package, purpose, extra in (
        ("pyarrow", "data import of parquet files", "parquet"),
        ("datasets", "data import of Hugging Face datasets", "datasets"),
    ):
        found = importlib.util.find_spec(package) is not None
        findings[package] = (
            f"installed: {purpose}" if found else f"missing: {purpose} needs pip install 'nanothink[{extra}]'"
        )
    return findings


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type == "cpu":
        return f"cpu: {torch.backends.cpu.get_cpu_capability()}; no CUDA device and no MPS found"
    return str(device)
