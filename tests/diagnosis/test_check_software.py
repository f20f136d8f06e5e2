"""What is said of installations, good and bad."""

from dataclasses import replace

import pytest

from fastjepa.diagnosis import check_software as check
from fastjepa.diagnosis.facts import Package, Software
from fastjepa.diagnosis.finding import Finding
from tests.diagnosis.machines import A100, GOOD, H100, V100, WANTS, with_packages, with_torch

NONE = Package()
BROKEN = Package("1.0", "undefined symbol: _ZN3c10")


def all_of(software: Software) -> list[Finding]:
    found = [
        check.check_torch(software),
        *check.check_gpus(software, WANTS),
        check.check_precision(software, WANTS),
        check.check_triton(software, WANTS),
        check.check_compiler(software),
        check.check_ninja(software),
        check.check_nccl(software),
        check.check_deepspeed(software, WANTS),
        check.check_decoder(software, WANTS),
        check.check_attention(software),
        check.check_packages(software, WANTS),
    ]
    return [finding for finding in found if finding is not None]


def test_nothing_is_wrong_with_a_good_machine() -> None:
    for software in (GOOD, with_torch(gpus=(H100,) * 8)):
        assert {finding.level for finding in all_of(software)} == {"ok"}


def test_what_is_wrong_says_what_to_do() -> None:
    bare = Software("3.12", {}, driver="470.1")
    broken = replace(GOOD, packages=dict.fromkeys(GOOD.packages, BROKEN), torch=None)
    for software in (bare, broken, with_torch(gpus=(V100, A100))):
        wrong = [finding for finding in all_of(software) if finding.level != "ok"]
        assert wrong
        assert all(finding.do for finding in wrong)


def test_torch() -> None:
    assert check.check_torch(with_packages(torch=NONE)).do == "pip install torch"
    broken = check.check_torch(replace(with_packages(torch=BROKEN), torch=None))
    assert broken.level == "fail"
    assert "undefined symbol" in broken.what
    assert check.check_torch(with_torch(version="2.10.0")).level == "fail"
    assert check.check_torch(with_torch(version="3.0")).level == "ok"


@pytest.mark.parametrize(
    ("software", "said"),
    [
        (replace(with_torch(gpus=()), driver=None), "no NVIDIA driver"),
        (with_torch(gpus=(), cuda=None), "built without CUDA"),
        (replace(with_torch(gpus=()), visible=""), "hidden by CUDA_VISIBLE_DEVICES=''"),
        (with_torch(gpus=(), error="driver too old (found version 11040)"), "found version 11040"),
    ],
)
def test_no_gpu(software: Software, said: str) -> None:
    """Of no consequence where none is asked for, a warning by default, and a failure where one is."""
    for device, level in (("cpu", "ok"), ("auto", "warn"), ("cuda", "fail")):
        (finding,) = check.check_gpus(software, replace(WANTS, device=device))  # type: ignore[arg-type]
        assert finding.level == level
        assert (said in finding.what) == (level != "ok")


def test_an_old_driver_is_told_from_the_version_that_torch_wants() -> None:
    (finding,) = check.check_gpus(with_torch(gpus=(), error="too old"), None)
    assert "update the driver to one for CUDA 13.0" in finding.do
    assert GOOD.driver is not None
    assert GOOD.driver in finding.what


def test_gpus_of_differing_kinds() -> None:
    (finding,) = check.check_gpus(with_torch(gpus=(H100, H100, A100)), WANTS)
    assert finding.level == "warn"
    assert "2 x NVIDIA H100, 1 x NVIDIA A100" in finding.what
    assert "CUDA_VISIBLE_DEVICES" in finding.do


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_80", "sm_90"), (8, 0), True),
        (("sm_80", "sm_90"), (8, 6), True),  # later of its generation
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_80", "compute_90"), (12, 0), True),  # compiled again for it
        (("sm_80", "compute_90"), (7, 0), False),
        (("sm_90a", "sm_100"), (9, 0), True),
        ((), (9, 0), True),  # not known
    ],
)
def test_a_gpu_without_kernels(
    architectures: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    software = with_torch(architectures=architectures, gpus=(replace(H100, capability=capability),))
    levels = [finding.level for finding in check.check_gpus(software, WANTS)]
    assert levels == (["ok"] if runs else ["ok", "fail"])


def test_precision() -> None:
    fp8 = replace(WANTS, fp8=True)
    for gpu, wants, level in (
        (V100, WANTS, "warn"),
        (V100, replace(WANTS, precision="fp32"), "ok"),
        (A100, WANTS, "ok"),
        (A100, fp8, "warn"),
        (H100, fp8, "ok"),
    ):
        finding = check.check_precision(with_torch(gpus=(H100, gpu)), wants)
        assert finding is not None
        assert finding.level == level
    assert check.check_precision(GOOD, replace(WANTS, device="cpu")) is None


def test_triton() -> None:
    for software, level, said in (
        (with_packages(triton=NONE), "warn", "pip install triton"),
        (with_packages(triton=BROKEN), "fail", "triton==3.8.*"),
        (with_packages(triton=Package("3.7.1")), "warn", "triton==3.8.*"),
        (replace(GOOD, compiler=None), "fail", "speed.kernels=torch"),
        (replace(GOOD, headers=False), "fail", "speed.kernels=torch"),
    ):
        finding = check.check_triton(software, WANTS)
        assert (finding.level, said in finding.do) == (level, True)
        on_cpu = check.check_triton(replace(software, torch=with_torch(gpus=()).torch), WANTS)
        assert on_cpu.level != "fail"
    assert "apt install python3-dev" in check.check_triton(replace(GOOD, headers=False), WANTS).what
    asked = replace(WANTS, kernels="triton")
    assert check.check_triton(with_packages(triton=NONE), asked).level == "fail"


def test_nccl() -> None:
    two = with_torch(gpus=(H100, H100))
    assert check.check_nccl(GOOD) is None
    none = check.check_nccl(with_torch(gpus=(H100, H100), nccl=None))
    assert none is not None
    assert none.level == "fail"
    other = check.check_nccl(with_torch(gpus=(H100, H100), nccl="2.18.1"))
    assert other is not None
    assert other.level == "warn"
    assert "LD_LIBRARY_PATH" in other.do
    good = check.check_nccl(two)
    assert good is not None
    assert good.level == "ok"


def test_deepspeed_is_missed_where_it_is_needed() -> None:
    zero = replace(WANTS, needs_deepspeed=True)
    for package in (NONE, BROKEN):
        one = with_packages(deepspeed=package)
        two = replace(one, torch=with_torch(gpus=(H100, H100)).torch)
        assert check.check_deepspeed(one, WANTS).level == "ok"
        assert check.check_deepspeed(two, WANTS).level == "warn"
        assert check.check_deepspeed(one, zero).level == "fail"
    assert "undefined symbol" in check.check_deepspeed(with_packages(deepspeed=BROKEN), zero).what


def test_decoder() -> None:
    for package in (NONE, BROKEN):
        software = with_packages(torchvision=package)
        assert check.check_decoder(software, WANTS).level == "warn"
        assert check.check_decoder(software, replace(WANTS, decoder="torchvision")).level == "fail"
        assert check.check_decoder(software, replace(WANTS, decoder="pillow")).level == "ok"
        assert check.check_decoder(software, replace(WANTS, decodes=False)).level == "ok"


def test_what_else_is_missing() -> None:
    finding = check.check_packages(with_packages(pyyaml=NONE, rich=NONE), None)
    assert finding == Finding(
        "fail", "packages", "pyyaml, rich not installed", "pip install 'fastjepa[train]'"
    )
    on_s3 = replace(WANTS, remote="s3")
    assert check.check_packages(GOOD, on_s3).do == "pip install fsspec s3fs"
    there = with_packages(fsspec=Package("1"), s3fs=Package("1"))
    assert check.check_packages(there, on_s3).level == "ok"
    assert check.check_attention(with_packages(flash_attn=BROKEN)).level == "warn"
