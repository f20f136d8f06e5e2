"""Facts about what is installed. Nothing is imported here: whatever must be, is by a process of its own."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from fastjepa.diagnosis.facts import Gpu, Package, Software, Torch

PACKAGES = (
    *("torch", "triton", "torchvision", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
    *("deepspeed", "ninja", "flash-attn", "pyyaml", "pillow", "rich", "matplotlib"),
    *("fsspec", "s3fs", "gcsfs"),
)
ANSWER_S = 120.0  # DeepSpeed takes ten on a busy drive
_DRIVER = Path("/proc/driver/nvidia/version")

_ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
try:
    found["architectures"] = torch._C._cuda_getArchFlags().split()
except Exception:
    pass
try:
    torch.cuda.init()
    found["gpus"] = [
        [p.name, [p.major, p.minor], p.total_memory]
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    for gpu in range(len(found["gpus"])):
        torch.ones(1, device=f"cuda:{gpu}").add_(1).item()
except Exception as error:
    found["gpus"], found["error"] = [], f"{error}".partition("\\n")[0]
try:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception:
    pass
print()
print(json.dumps(found))
"""
# What each is imported for.
_IMPORTS = {
    "deepspeed": "import deepspeed",
    "flash-attn": "import flash_attn",
    "triton": "import triton.language",
    "torchvision": "from torchvision.io import decode_jpeg",
}
IMPORTABLE = tuple(_IMPORTS)


def look_at_software(to_import: Collection[str] = IMPORTABLE) -> Software:
    """Look at what is installed, and try whether torch and the devices work.

    Args:
        to_import: what else is tried, if it is installed: each costs the time of its import.
    """
    versions = {name: _version(name) for name in PACKAGES}
    tries = [name for name in to_import if versions[name] is not None]
    with ThreadPoolExecutor() as pool:
        torch_answer = pool.submit(_ask, _ASK_TORCH) if versions["torch"] else None
        errors = dict(zip(tries, pool.map(lambda name: _ask(_IMPORTS[name])[1], tries), strict=True))
    torch, error = (None, None) if torch_answer is None else torch_answer.result()
    packages = {name: Package(version, errors.get(name)) for name, version in versions.items()}
    packages["torch"] = Package(versions["torch"], error)
    return Software(
        python=platform.python_version(),
        packages=packages,
        torch=None if torch is None else _torch_of(torch),
        torch_wants=_pins("torch"),
        driver=nvidia_driver(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        compiler=_compiler(os.environ),
        headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pins(distribution: str) -> dict[str, str]:
    """Version prefixes that it asks for by == or ~=: {"triton": "3.8"}."""
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in requirements:
        if pin := re.match(r"([\w.-]+?) ?\(?([=~]=) ?([\d.]+)", requirement):
            name, sign, version = pin.groups()
            found[name.lower()] = version if sign == "==" else version.rpartition(".")[0]
    return found


def _ask(code: str) -> tuple[dict[str, Any] | None, str | None]:
    """Run `code` in another Python: the JSON that is its last line, if any, and how it failed, if it did."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer for {ANSWER_S:g} s"
    except OSError as error:
        return None, str(error)
    if done.returncode < 0:
        return None, f"ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit status {done.returncode}"
    last = done.stdout.strip().rpartition("\n")[2]
    return (json.loads(last) if last.startswith("{") else None), None


def _torch_of(found: Mapping[str, Any]) -> Torch:
    return Torch(
        version=found["version"],
        cuda=found["cuda"],
        hip=found["hip"],
        architectures=tuple(found.get("architectures", ())),
        nccl=found.get("nccl"),
        gpus=tuple(Gpu(name, (major, minor), memory) for name, (major, minor), memory in found["gpus"]),
        error=found.get("error"),
    )


def nvidia_driver() -> str | None:
    """Its version, if this system has it."""
    try:
        found = re.search(r"(\d+\.\d+(\.\d+)?)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else "of unknown version"


def _compiler(environment: Mapping[str, str]) -> str | None:
    """As Triton looks for it."""
    named = environment.get("CC")
    if named is not None:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")
