"""The checks one after another, each as soon as its facts are known.

What needs torch or PyYAML is imported only once they were seen to be there: a package that is missing or
broken is a finding, and ends no diagnosis.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastjepa.diagnosis import check_software
from fastjepa.diagnosis.facts import Drive, Host, Software, Wants
from fastjepa.diagnosis.finding import Finding
from fastjepa.diagnosis.machine import look_at_drive, look_at_host
from fastjepa.diagnosis.software import look_at_software, nvidia_driver

if TYPE_CHECKING:
    from fastjepa.config import Config
    from fastjepa.engine.images import RunImages


def diagnose(config_file: str | None, overrides: Sequence[str]) -> Iterator[Finding]:
    """Look at the software and the host; with a configuration also at what it needs of them.

    One rank for each GPU that can be seen is what is taken to run here.

    Args:
        config_file: a YAML file; with neither it nor overrides there is no configuration.
        overrides: section.key=value.
    """
    config = _load(config_file, overrides) if config_file is not None or overrides else None
    software, host = look_at_software(_to_import(config)), look_at_host()
    yield check_software.check_torch(software)
    if isinstance(config, Finding):
        yield config
    try:
        if config is None or isinstance(config, Finding) or software.torch is None:
            yield check_software.check_packages(software, None)
            yield from _of_software(software, None)
            yield from _of_host(host, look_at_drive(Path()), None)
        else:
            yield from _of_run(config, software, host)
    except ImportError as error:  # also of what is installed and broken
        yield Finding(
            "fail", "packages", f"the rest was not looked at: {error}", "repair that, and ask again"
        )


def _to_import(config: "Config | Finding | None") -> list[str]:
    """What is worth the time: torchvision where it may decode, DeepSpeed where it may be needed."""
    known = None if isinstance(config, Finding) else config
    tried = ["triton", "flash-attn"]
    asks_for_zero = known is not None and (bool(known.deepspeed) or known.speed.zero_stage not in ("auto", 0))
    if config is None or asks_for_zero or nvidia_driver() is not None:
        tried.append("deepspeed")
    if config is None or (known is not None and known.data.name != "fashion_mnist"):
        tried.append("torchvision")
    return tried


def _load(config_file: str | None, overrides: Sequence[str]) -> "Config | Finding":
    try:
        from fastjepa.config import ConfigError, load_config
    except ImportError as error:
        what = f"cannot be read: {error}"
        return Finding("fail", "configuration", what, check_software.TRAIN)
    try:
        return load_config(config_file, overrides)
    except ConfigError as error:
        return Finding("fail", "configuration", str(error))


def _of_software(software: Software, wants: Wants | None) -> Iterator[Finding]:
    yield from check_software.check_gpus(software, wants)
    for finding in (check_software.check_nccl(software), check_software.check_precision(software, wants)):
        if finding is not None:
            yield finding
    yield check_software.check_triton(software, wants)
    yield check_software.check_attention(software)
    yield check_software.check_compiler(software)
    yield check_software.check_ninja(software)
    yield check_software.check_deepspeed(software, wants)
    yield check_software.check_decoder(software, wants)


def _of_host(host: Host, drive: Drive, wants: Wants | None) -> Iterator[Finding]:
    from fastjepa.diagnosis import check_machine

    yield check_machine.check_cores(host, wants)
    yield check_machine.check_files(host, wants)
    yield check_machine.check_shared_memory(host, wants)
    if wants is not None:
        yield check_machine.check_memory(host, wants)
    yield check_machine.check_drive(drive, wants)


def _of_run(config: "Config", software: Software, host: Host) -> Iterator[Finding]:
    """With a configuration, and a torch that can be imported."""
    import torch

    from fastjepa.config import ConfigError
    from fastjepa.diagnosis.wants import try_config, wants_of
    from fastjepa.engine.folder import folder_of

    on_gpu = bool(software.gpus) and config.speed.device != "cpu"
    ranks = len(software.gpus) if on_gpu else 1
    asked = try_config(config, ranks, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    yield from asked.findings
    try:
        wants = wants_of(config, ranks, asked.steps)
    except ConfigError:  # which is among these findings
        wants = None
    yield check_software.check_packages(software, wants)
    yield from _of_software(software, wants)
    drive = look_at_drive(folder_of(config).path)
    yield from _of_host(host, drive, wants)
    if wants is not None:
        yield from _of_rates(config, asked.images, host, drive, wants, on_gpu)


def _of_rates(
    config: "Config", images: "RunImages | None", host: Host, drive: Drive, wants: Wants, on_gpu: bool
) -> Iterator[Finding]:
    """How fast images come, are eaten, and checkpoints are written."""
    from fastjepa.diagnosis import feeding
    from fastjepa.diagnosis.check_feeding import check_feeding, say_of_h100
    from fastjepa.diagnosis.check_machine import check_drive_rate

    appetite, unmeasured = feeding.appetite_of(config, wants.ranks, on_gpu)
    if unmeasured is not None:
        yield unmeasured
    if images is not None:
        loading = feeding.try_loading(config, images)
        if isinstance(loading, Finding):
            yield loading
        else:
            yield check_feeding(loading, appetite, host, wants)
            if not on_gpu:
                yield say_of_h100(loading, feeding.appetite_of_h100(config, wants.ranks), host)
    rate = check_drive_rate(drive, wants, appetite.images_per_second * wants.ranks)
    if rate is not None:
        yield rate
