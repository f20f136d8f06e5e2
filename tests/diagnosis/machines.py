"""Machines that are not at hand, as facts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastjepa.diagnosis.facts import Drive, Gpu, Host, Package, Software, Torch, Wants

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 10**9)
A100 = Gpu("NVIDIA A100", (8, 0), 40 * 10**9)
V100 = Gpu("NVIDIA V100", (7, 0), 16 * 10**9)
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "compute_100")

PACKAGES = {
    "torch": Package("2.14.1+cu130"),
    "triton": Package("3.8.0"),
    "torchvision": Package("0.29.1"),
    "nvidia-nccl-cu13": Package("2.30.7"),
    "deepspeed": Package("0.19.8"),
    "ninja": Package("1.13.2"),
    "pyyaml": Package("6.0.3"),
    "pillow": Package("13.0.0"),
    "rich": Package("15.0.0"),
    "matplotlib": Package("3.11.2"),
}
TORCH = Torch("2.14.1+cu130", "13.0", architectures=ARCHITECTURES, nccl="2.30.7", gpus=(H100,))
GOOD = Software(
    python="3.12.1",
    packages=PACKAGES,
    torch=TORCH,
    torch_wants={"triton": "3.8", "nvidia-nccl-cu13": "2.30.7"},
    driver="580.65.06",
    compiler="/usr/bin/gcc",
    headers=True,
)
HOST = Host(cores=16, memory_bytes=128 * 10**9, shared_bytes=64 * 10**9, soft_files=65536, hard_files=65536)
DRIVE = Drive(Path("/data"), free_bytes=10**12, bytes_per_second=1e9)
WANTS = Wants(
    ranks=1,
    device="auto",
    precision="bf16",
    fp8=False,
    kernels="auto",
    needs_deepspeed=False,
    workers=8,
    micro_batch=256,
    decodes=True,
    decoder="auto",
    augment="cpu",
    remote=None,
    is_packed=False,
    batch_bytes=256 * 3 * 224**2,
    checkpoint_bytes=1_500_000_000,
    keep_last=2,
    kept=2,
    save_every_images=2_048_000,
)


def with_torch(**changes: Any) -> Software:
    """The good machine, with another torch."""
    return replace(GOOD, torch=replace(TORCH, **changes))


def with_packages(**changes: Package) -> Software:
    """The good machine with other packages; flash_attn stands for flash-attn."""
    return replace(GOOD, packages=PACKAGES | {name.replace("_", "-"): p for name, p in changes.items()})
