"""Facts are gathered whatever is broken."""

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa.config import load_config, parse_config
from fastjepa.diagnosis import feeding, machine, software
from fastjepa.diagnosis.facts import Loading
from fastjepa.diagnosis.finding import Finding
from fastjepa.diagnosis.wants import try_config, wants_of
from fastjepa.engine.images import open_images
from tests.conftest import ROOT, TINY
from tests.test_bad_input import write_images

if TYPE_CHECKING:
    from tests.conftest import Trainer

SMALL = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}  # of MAE


def distribution(folder: Path, name: str, module: str, code: str) -> None:
    """An installed package, as far as Python's metadata go."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{module}.py").write_text(code)


def test_packages_that_break_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "flash_attn", "flash_attn", "raise ImportError('undefined symbol: _ZN3c10')")
    distribution(
        tmp_path, "deepspeed", "deepspeed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    distribution(tmp_path, "torchvision", "torchvision", "raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = software.look_at_software()
    assert found.package("flash-attn").error == "ImportError: undefined symbol: _ZN3c10"
    assert found.package("deepspeed").error == "ended by SIGSEGV"
    assert found.package("torchvision").version == "1.0"
    assert not found.package("torchvision").is_usable
    assert found.torch is not None
    assert found.torch.version == torch.__version__
    assert len(found.gpus) == torch.cuda.device_count()


def test_what_is_slow_to_import_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "ANSWER_S", 0.2)
    assert software._ask("import time; time.sleep(60)") == (None, "no answer for 0.2 s")


def test_pins_of_torch() -> None:
    pins = software._pins("torch")
    assert software._pins("no-such-distribution") == {}
    if torch.version.cuda:
        assert pins["triton"].count(".") == 1


def test_the_host() -> None:
    host = machine.look_at_host()
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert host.soft_files in (soft, None)


def test_the_drive_of_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    drive = machine.look_at_drive(tmp_path / "runs" / "first")
    assert drive.folder == tmp_path
    assert drive.error is None
    assert drive.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_to() -> None:
    drive = machine.look_at_drive(Path("/proc/run"))
    assert drive.folder == Path("/proc")
    assert drive.error is not None


@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_a_checkpoint_is_as_large_as_its_shapes_say(train: "Trainer", objective: str) -> None:
    """Beside the real one, whose files have headers."""
    small = [f"model.{key}={value}" for key, value in SMALL.items()]
    overrides = [f"objective.name={objective}", "optim.steps=1", "optim.warmup_epochs=0", *small]
    train(*overrides).check()
    files = [*(train.run / "checkpoints" / "step_00000001").glob("*.safetensors")]
    written = sum(file.stat().st_size for file in files)
    wants = wants_of(load_config(train.write_config(), overrides), 1, 1)
    assert 0 <= written - wants.checkpoint_bytes < 8192 * len(files)
    assert machine.look_at_drive(train.run).saved_bytes >= written


def test_what_the_largest_recipe_wants() -> None:
    """630 million parameters in each encoder and 22 in the predictor."""
    config = load_config(ROOT / "configs" / "ijepa_vit_huge_14.yaml", ["data.root=/images"])
    wants = wants_of(config, 16, 1000)
    assert wants.checkpoint_bytes == pytest.approx(4 * (4 * 630.4e6 + 3 * 22.3e6), rel=0.01)
    assert wants.batch_bytes == 128 * 3 * 224 * 224


def test_what_the_trainer_would_refuse(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    nowhere = load_config(None, ["data.name=folder", f"data.root={tmp_path / 'nowhere'}"])
    (finding,) = try_config(nowhere, 1, cpu).findings
    assert finding.level == "fail"
    assert "nowhere" in finding.what
    asked = try_config(parse_config(TINY), 1, cpu)
    assert [f.level for f in asked.findings] == ["ok"]
    assert asked.steps == 10
    several = try_config(parse_config(TINY), 3, cpu)
    assert "does not divide into 3 ranks" in several.findings[0].what


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(feeding, "_MEASURE_S", 0.1)
    write_images(tmp_path, 32)
    changed = {"data": TINY["data"] | {"name": "folder", "root": str(tmp_path), "hold_out": 0}}
    config = parse_config(TINY | changed | {"speed": {"workers": workers, "device": "cpu"}})
    loading = feeding.try_loading(config, open_images(config))
    assert isinstance(loading, Loading)
    assert loading.workers == workers
    assert loading.one_core > 0
    assert (loading.images_per_second == loading.one_core) == (workers == 0)


def test_a_loader_that_cannot_read_is_a_finding(tmp_path: Path) -> None:
    write_images(tmp_path, 32)
    changed = {"data": TINY["data"] | {"name": "folder", "root": str(tmp_path), "hold_out": 0}}
    config = parse_config(TINY | changed)
    images = open_images(config)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    finding = feeding.try_loading(config, images)
    assert isinstance(finding, Finding)
    assert finding.level == "fail"


@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_small_models_are_measured_by_real_steps(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.setattr(feeding, "_MEASURE_S", 0.1)
    monkeypatch.setattr(feeding, "_PATIENT_STEP_S", 60.0)
    config = parse_config(TINY | {"objective": {"name": objective}, "model": TINY["model"] | SMALL})
    appetite, problem = feeding.appetite_of(config, 1, on_gpu=False)
    assert problem is None
    assert appetite.how.startswith("measured by")
    assert appetite.how.endswith("real steps of 16 images")
    assert appetite.images_per_second > 0


def test_large_ones_by_their_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_PATIENT_STEP_S", 0.0)
    appetite, problem = feeding.appetite_of(parse_config(TINY), 1, on_gpu=False)
    assert problem is None
    assert appetite.how.startswith("not measured: ")


def test_a_step_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_PATIENT_STEP_S", 60.0)
    cuda = parse_config(TINY | {"speed": {"kernels": "cuda"}})  # of which there are none on a CPU
    appetite, problem = feeding.appetite_of(cuda, 1, on_gpu=False)
    assert problem is not None
    assert problem.level == "fail"
    assert "training fails (ConfigError: speed.kernels cuda" in problem.what
    assert appetite.how.startswith("not measured: ")


def test_work_of_an_image_is_that_of_the_throughput_tables() -> None:
    """ViT-B/16 with budget masks, as docs/performance.md has it: 90.19 GFLOP of an image."""
    config = load_config(ROOT / "configs" / "vit_base_16.yaml", ["data.root=/images"])
    assert feeding.useful_flop(config, 64) == pytest.approx(90.19e9, rel=0.001)
