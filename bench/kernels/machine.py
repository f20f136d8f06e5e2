"""Where and with what something was measured."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastjepa_kernels.language import HAS_TRITON, triton
from fastjepa_kernels.native import HAS_CPP, HAS_CUDA

ROOT = Path(__file__).resolve().parents[2]


def processor() -> str:
    """The name the CPU gives itself."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the working tree, with + if something in it is changed; "unknown" outside of git.

    FASTJEPA_COMMIT says it for a copy of a tree, which may lack its history or have an older one.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    said = os.environ.get("FASTJEPA_COMMIT")
    if said:
        return said
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def facts(device: torch.device) -> dict[str, Any]:
    """What a result says about where it is from."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    about = {
        "device": gpu.name if gpu else "cpu",
        "processor": processor(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ"),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "python": platform.python_version(),
        "extension": {"cpp": HAS_CPP, "cuda": HAS_CUDA},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if gpu:
        about |= {
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "flash_attn": installed("flash-attn"),
            "flash_attn_4": installed("flash-attn-4"),
        }
    return about
