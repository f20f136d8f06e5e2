"""What is known of a machine, of what is installed, and of what a configuration asks of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A distribution.

    Attributes:
        version: that is installed; None for none.
        error: why it cannot be imported; None if it can, or was not tried.
    """

    version: str | None = None
    error: str | None = None

    @property
    def is_usable(self) -> bool:
        return self.version is not None and self.error is None


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Torch:
    """What torch says of itself and of the devices.

    Attributes:
        cuda: version that it was built for; None for the CPU's build and for ROCm's.
        hip: the same of ROCm.
        architectures: that its kernels were compiled for, as sm_90 or compute_90.
        nccl: version that it has loaded.
        gpus: that it can use.
        error: why it can use none.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Software:
    """Attributes:
    packages: by the name of the distribution.
    torch: None if it cannot be imported; its package says why.
    torch_wants: versions that torch's own metadata pins, by distribution.
    driver: version of NVIDIA's, if the kernel has one.
    visible: what CUDA_VISIBLE_DEVICES is set to.
    compiler: of C, that Triton would call.
    headers: whether Python.h is there.
    """

    python: str
    packages: Mapping[str, Package]
    torch: Torch | None = None
    torch_wants: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    visible: str | None = None
    compiler: str | None = None
    headers: bool = False

    def package(self, name: str) -> Package:
        return self.packages.get(name, Package())

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.torch.gpus if self.torch is not None else ()


@dataclass(frozen=True)
class Host:
    """Attributes:
    cores: that this process may use.
    memory_bytes: that are available.
    shared_bytes: free in /dev/shm; None where there is none.
    soft_files, hard_files: limits of open files; None for no limit.
    """

    cores: int
    memory_bytes: int | None = None
    shared_bytes: int | None = None
    soft_files: int | None = None
    hard_files: int | None = None


@dataclass(frozen=True)
class Drive:
    """Where a run goes.

    Attributes:
        folder: of the run, or what there is of its path.
        free_bytes: there.
        error: why nothing can be written.
        bytes_per_second: written and synced; None if it was not measured.
        saved_bytes: that checkpoints of this run take already.
    """

    folder: Path
    free_bytes: int = 0
    error: str | None = None
    bytes_per_second: float | None = None
    saved_bytes: int = 0


@dataclass(frozen=True)
class Wants:
    """What a configuration asks of this host.

    Attributes:
        ranks: that would run here, one for each GPU.
        micro_batch: images of a rank.
        needs_deepspeed: even on one device.
        decodes: whether images are files to be decoded.
        remote: the protocol of the data's URL, as s3; None for files.
        is_packed: the images are shards.
        batch_bytes: of a micro-batch's views.
        checkpoint_bytes: of one checkpoint, which is the fp32 state of the run.
        kept: checkpoints that stay at the end, by run.keep_last and run.keep_every.
        save_every_images: images between two checkpoints, over all ranks.
    """

    ranks: int
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    fp8: bool
    kernels: str
    needs_deepspeed: bool
    workers: int
    micro_batch: int
    decodes: bool
    decoder: Literal["auto", "pillow", "torchvision"]
    augment: Literal["cpu", "device"]
    remote: str | None
    is_packed: bool
    batch_bytes: int
    checkpoint_bytes: int
    keep_last: int
    kept: int
    save_every_images: int


@dataclass(frozen=True)
class Loading:
    """How fast the loader of this configuration is, on this configuration's images.

    Attributes:
        one_core: images/s read in the training process itself, which is one core's worth.
        images_per_second: of one rank with the configured workers.
        decoder: that was used.
    """

    one_core: float
    images_per_second: float
    workers: int
    decoder: str


@dataclass(frozen=True)
class Appetite:
    """What the model of this configuration eats.

    Attributes:
        images_per_second: of one rank.
        device: that eats.
        how: how that is known, in words.
    """

    images_per_second: float
    device: str
    how: str
