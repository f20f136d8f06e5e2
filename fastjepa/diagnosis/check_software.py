"""Whether what is installed works, fits together, and is all that a configuration needs."""

from collections import Counter
from collections.abc import Sequence

from fastjepa.diagnosis.facts import Gpu, Software, Wants
from fastjepa.diagnosis.finding import Finding, Level

OLDEST_TORCH = (2, 11)
TRAIN = "pip install 'fastjepa[train]'"
_STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def check_torch(software: Software) -> Finding:
    package = software.package("torch")
    if package.version is None:
        return Finding("fail", "torch", "not installed", "pip install torch")
    if software.torch is None:
        return Finding(
            "fail", "torch", f"{package.version} cannot be imported ({package.error})", "install it again"
        )
    torch = software.torch
    for_what = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "the CPU"
    what = f"{torch.version} for {for_what}, Python {software.python}"
    if _numbers(torch.version)[:2] < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("fail", "torch", what, f"fastjepa needs {oldest} or newer: pip install -U torch")
    return Finding("ok", "torch", what)


def check_gpus(software: Software, wants: Wants | None) -> list[Finding]:
    """What a run would compute on."""
    torch = software.torch
    if torch is None:
        return []
    if wants is not None and wants.device == "cpu":
        return [Finding("ok", "GPUs", "not used: speed.device is cpu")]
    if not torch.gpus:
        return [_no_gpu(software, wants)]
    findings = []
    kinds = Counter(gpu.name for gpu in torch.gpus)
    what = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    driver = f", driver {software.driver}" if software.driver else ""
    if len(kinds) > 1:
        do = "the slowest sets the pace of all: choose some alike with CUDA_VISIBLE_DEVICES"
        findings.append(Finding("warn", "GPUs", f"{what}{driver}", do))
    else:
        memory = min(gpu.memory_bytes for gpu in torch.gpus) / 1e9
        findings.append(Finding("ok", "GPUs", f"{what} of {memory:.0f} GB{driver}"))
    too_old = [gpu for gpu in torch.gpus if not _runs_on(torch.architectures, gpu)]
    if too_old and torch.hip is None:
        major, minor = too_old[0].capability
        findings.append(
            Finding(
                "fail",
                "GPUs",
                f"torch {torch.version} has no kernels for {too_old[0].name} (compute capability "
                f"{major}.{minor}), only for {', '.join(torch.architectures)}",
                "install a build of torch that has: https://pytorch.org/get-started",
            )
        )
    return findings


def _no_gpu(software: Software, wants: Wants | None) -> Finding:
    torch = software.torch
    assert torch is not None
    if software.driver is None:
        what, do = (
            "none: this system has no NVIDIA driver",
            "training is on the CPU, fit for small models alone",
        )
    elif torch.cuda is None:
        what = f"NVIDIA driver {software.driver}, but torch {torch.version} is built without CUDA"
        do = "install torch for CUDA: https://pytorch.org/get-started"
    elif software.visible is not None and software.visible.strip() in ("", "-1"):
        what, do = f"hidden by CUDA_VISIBLE_DEVICES={software.visible!r}", "unset it"
    else:
        versions = f"NVIDIA driver {software.driver}, torch for CUDA {torch.cuda}"
        what = f"torch can use none ({torch.error}); {versions}"
        do = f"update the driver to one for CUDA {torch.cuda}, or install torch for an older CUDA"
    if wants is not None and wants.device == "cuda":
        return Finding("fail", "GPUs", what, f"speed.device is cuda; {do}")
    return Finding("warn", "GPUs", what, do)


def _runs_on(architectures: Sequence[str], gpu: Gpu) -> bool:
    """Whether kernels were compiled for it: for its generation and not beyond, or for all later ones."""
    own = gpu.capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if not digits:
            continue
        built = int(digits[:-1]), int(digits[-1])
        if (kind == "compute" and built <= own) or (built[0] == own[0] and built <= own):
            return True
    return not architectures


def check_precision(software: Software, wants: Wants | None) -> Finding | None:
    """Whether the GPUs compute in what is asked for; None where nothing is asked of them."""
    if wants is None or wants.device == "cpu" or software.torch is None or software.torch.hip:
        return None
    if not software.gpus:
        return None
    worst = min(software.gpus, key=lambda gpu: gpu.capability)
    if wants.precision == "bf16" and worst.capability < (8, 0):
        what, do = f"{worst.name} has no bf16 arithmetic", "use optim.precision=fp32"
        return Finding("warn", "precision", what, do)
    if wants.fp8 and worst.capability < (8, 9):
        what = f"{worst.name} has no fp8: the target encoder would run in bf16"
        return Finding("warn", "precision", what, "leave speed.target_precision at auto")
    return Finding("ok", "precision", f"{wants.precision}{', target encoder fp8' if wants.fp8 else ''}")


def check_triton(software: Software, wants: Wants | None) -> Finding:
    """What most kernels on a GPU are written in; it compiles a launcher with C when one is first used."""
    package, pinned = software.package("triton"), software.torch_wants.get("triton")
    is_used = bool(software.gpus) and (wants is None or wants.device != "cpu")
    without = "speed.kernels=torch" if wants is None or wants.kernels in ("auto", "triton") else ""
    if package.version is None:
        if not is_used:
            return Finding("ok", "Triton", "not installed, and not used on a CPU")
        level: Level = "fail" if wants is not None and wants.kernels == "triton" else "warn"
        return Finding(
            level, "Triton", "not installed: the GPU runs the slower kernels", "pip install triton"
        )
    if package.error is not None:
        what = f"{package.version} cannot be imported ({package.error})"
        do = f"pip install 'triton=={pinned}.*'" if pinned else "install it again"
        return Finding("fail" if is_used else "warn", "Triton", what, do)
    if pinned is not None and not _begins(package.version, pinned):
        what = f"{package.version}, and torch {software.package('torch').version} is made for {pinned}"
        return Finding("warn", "Triton", what, f"pip install 'triton=={pinned}.*'")
    missing = []
    if software.compiler is None:
        missing.append("a C compiler (apt install gcc, or set CC)")
    if not software.headers:
        missing.append("Python's headers (apt install python3-dev)")
    if is_used and missing:
        what = f"{package.version} can compile nothing here: it needs {' and '.join(missing)}"
        return Finding("fail", "Triton", what, f"install that{f', or use {without}' if without else ''}")
    return Finding("ok", "Triton", package.version if is_used else f"{package.version}, not used on a CPU")


def check_compiler(software: Software) -> Finding:
    """For the optional extension, and for what Triton and torch.compile build."""
    if software.compiler is None:
        what = "none: no gcc and no clang"
        return Finding(
            "warn", "C compiler", what, "apt install gcc g++, for speed.compile and the C++ kernels"
        )
    headers = "with Python's headers" if software.headers else "without Python's headers"
    if not software.headers:
        return Finding("warn", "C compiler", f"{software.compiler}, {headers}", "apt install python3-dev")
    return Finding("ok", "C compiler", f"{software.compiler}, {headers}")


def check_ninja(software: Software) -> Finding:
    version = software.package("ninja").version
    if version is None:
        what = "not installed; the C++ kernels and some options of DeepSpeed are built with it"
        return Finding("warn", "ninja", what, "pip install ninja")
    return Finding("ok", "ninja", version)


def check_nccl(software: Software) -> Finding | None:
    """What several GPUs talk by; None without several."""
    torch = software.torch
    if torch is None or len(torch.gpus) < 2 or torch.hip is not None:
        return None
    if torch.nccl is None:
        what = f"torch {torch.version} is built without it: several GPUs cannot train together"
        return Finding("fail", "NCCL", what, "install torch for CUDA: https://pytorch.org/get-started")
    installed = {name: p.version for name, p in software.packages.items() if name.startswith("nvidia-nccl")}
    beside = [f"{name} {version}" for name, version in installed.items() if version is not None]
    if beside and not any(_begins(torch.nccl, _dotted(version or "")) for version in installed.values()):
        what = f"torch has loaded {torch.nccl}, not its own ({', '.join(beside)})"
        return Finding("warn", "NCCL", what, "look in LD_LIBRARY_PATH and LD_PRELOAD for another one")
    return Finding("ok", "NCCL", torch.nccl)


def check_deepspeed(software: Software, wants: Wants | None) -> Finding:
    """One device needs none."""
    package, gpus = software.package("deepspeed"), len(software.gpus)
    needed = wants is not None and wants.needs_deepspeed
    on_cpu = wants is not None and wants.device == "cpu"
    if package.is_usable:
        return Finding("ok", "DeepSpeed", f"{package.version}")
    if package.version is None:
        what, do = "not installed", TRAIN
    else:
        what, do = (
            f"{package.version} cannot be imported ({package.error})",
            f"repair or reinstall it: {TRAIN}",
        )
    if needed:
        return Finding("fail", "DeepSpeed", f"{what}, and this configuration asks for a ZeRO stage of it", do)
    if gpus > 1 and not on_cpu:
        return Finding("warn", "DeepSpeed", f"{what}: one GPU of {gpus} could train", do)
    return Finding("ok", "DeepSpeed", f"{what}; one device needs none")


def check_decoder(software: Software, wants: Wants | None) -> Finding:
    """torchvision, the faster decoder of JPEGs."""
    package = software.package("torchvision")
    named = wants is not None and wants.decoder == "torchvision"
    decodes = wants is None or (wants.decodes and wants.decoder != "pillow")
    if not decodes and not named:
        return Finding("ok", "torchvision", f"{package.version or 'not installed'}, not used")
    torch = software.package("torch").version
    if package.version is None:
        what, do = (
            "not installed: JPEGs are decoded by Pillow, at about half the speed",
            "pip install torchvision",
        )
    elif package.error is not None:
        what = f"{package.version} does not work beside torch {torch} ({package.error})"
        do = "install the torchvision that belongs to that torch, or use speed.decoder=pillow"
    else:
        return Finding("ok", "torchvision", package.version)
    return Finding("fail" if named else "warn", "torchvision", what, do)


def check_attention(software: Software) -> Finding:
    """flash-attn, which is tried where it was measured to be the fastest."""
    package = software.package("flash-attn")
    if package.version is None:
        return Finding("ok", "flash-attn", "not installed; the attention of Triton and of torch needs none")
    if package.error is not None and software.gpus:
        what = f"{package.version} cannot be imported ({package.error})"
        return Finding("warn", "flash-attn", what, "build it again for this torch, or uninstall it")
    return Finding("ok", "flash-attn", package.version)


def check_packages(software: Software, wants: Wants | None) -> Finding:
    """The other packages that a run or its data need."""
    needed = ["pyyaml", "pillow", "rich", "matplotlib"]
    missing = [name for name in needed if software.package(name).version is None]
    if missing:
        return Finding("fail", "packages", f"{', '.join(missing)} not installed", TRAIN)
    if wants is not None and wants.remote is not None:
        stores = ["fsspec", *([_STORES[wants.remote]] if wants.remote in _STORES else [])]
        absent = [name for name in stores if software.package(name).version is None]
        if absent:
            what = f"{', '.join(absent)} not installed, and data.root is a URL of {wants.remote}"
            return Finding("fail", "packages", what, f"pip install {' '.join(absent)}")
    return Finding("ok", "packages", ", ".join(f"{n} {software.package(n).version}" for n in needed))


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.14.1+cu130" -> (2, 14, 1)."""
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdecimal())


def _dotted(version: str) -> str:
    """At most three numbers: NCCL's packages may have a fourth."""
    return ".".join(version.split(".")[:3])


def _begins(version: str, prefix: str) -> bool:
    wanted = _numbers(prefix)
    return _numbers(version)[: len(wanted)] == wanted
