"""`fastjepa plan`, and the commands that docs/recipes.md shows."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastjepa.cli import main
from fastjepa.commands.plan import IMAGENET, memory
from tests.data.pictures import write_photos

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "vit_small_16.yaml")
PLAN = ["plan", "--config", CONFIG, "--memory", "80GB"]


def test_it_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "Predicted, not measured: vit_small_16 on 8 GPUs of 80 GB, of which 60 GB are for "
    )
    table = said.split("\n\n")[1].splitlines()
    assert table[0].split()[-7:] == ["ZeRO", "0", "ZeRO", "1", "ZeRO", "2", "*", "ZeRO", "3"][-7:]
    columns = [[float(cell) for cell in re.findall(r"\d+\.\d+", line)] for line in table[1:10]]
    for parts in zip(*columns, strict=True):
        assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.05), "parts sum up to the peak"
    assert "Batch: 1,024 images, 128 of each GPU. The largest part of them that fits: 128 images" in said
    assert "with speed.accumulation=1 speed.zero_stage=2" in said
    assert "As configured: 128 images in one micro-batch at ZeRO 2" in said
    assert "at an MFU of 35% of 989 TFLOP/s a GPU, judging and saving left out" in said
    assert f"Assumed: {IMAGENET:,} images an epoch as ImageNet-1k has; 220 images/s of a core" in said


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for arguments in (
        ["optim.global_batch=96", *PLAN[1:]],
        [*PLAN[1:], "optim.global_batch=96", "--gpus", "1"],
    ):
        assert main(["plan", *arguments]) == 0
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1]
    assert "Batch: 96 images" in seen[0]


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*PLAN, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_for_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    plain = plan_of(capsys)
    assert plain["what"] == "predicted, not measured"
    assert plain["images"] == 300 * (IMAGENET // 1024) * 1024
    faster = plan_of(capsys, "--mfu", "0.7", "--tflops", "989", "--images-per-core", "440")
    assert faster["hours"] == pytest.approx(plain["hours"] / 2)
    assert faster["images_per_second"] == pytest.approx(plain["images_per_second"] * 2)
    assert abs(faster["cores"] - plain["cores"]) <= 1
    a100 = plan_of(capsys, "--device", "a100", "--gpus", "2")
    assert a100["hours"] == pytest.approx(plain["hours"] * 989 / 312 / 2)
    assert plan_of(capsys, "--images", "10240")["images"] == 300 * 10240


def test_the_embedded_images(capsys: pytest.CaptureFixture[str]) -> None:
    embedded = str(ROOT / "configs" / "fashion_mnist.yaml")
    arguments = ["--config", embedded, "optim.precision=bf16", "--memory", "8GB", "--measure-loader"]
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "ViT-F/4 of 28 px, jepa, masks of mode budget: 0.9 M parameters are trained" in said
    assert "for 128,000 images" in said


def test_images_at_hand_are_counted_and_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_photos(tmp_path / "images", 40)
    overrides = [f"data.root={tmp_path / 'images'}", "optim.global_batch=8", "data.image_size=32"]
    small = [*overrides, "model.patch_size=4"]
    assert plan_of(capsys, *small)["images"] == 300 * 40
    assert main([*PLAN, "--measure-loader", *small]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Assumed: 40 images an epoch; [\d,]+ images/s of a core \(measured here\)", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.lr=fast"], "optim.lr must be a number"),
        (["--gpus", "3"], "optim.global_batch 1024 does not divide into 3 ranks"),
        (["--memory", "100MB"], "it does not fit: a micro-batch of 1 at ZeRO 0 needs "),
        (["--measure-loader"], "data.name folder needs data.root"),
        (["data.root=/nowhere"], "/nowhere"),
        (["optim.precision=fp32"], "give optim.precision=bf16"),
        (["--images", "100"], "optim.global_batch"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main([*PLAN, *arguments]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("error: ")
    assert said in seen.err
    assert seen.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "80"],
        ["--memory", "-80GB"],
        ["--memory", "0GB"],
        ["--memory", "eighty"],
        ["--memory", "80KB"],
        ["--mfu", "0"],
        ["--mfu", "1.1"],
        ["--mfu", "nan"],
        ["--tflops", "-1"],
        ["--tflops", "inf"],
        ["--tflops", "1e300"],
        ["--images-per-core", "1e-300"],
        ["--memory", "1001TB"],
        ["--memory", "9" * 400 + "GB"],
        ["--gpus", "0"],
        ["--device", "v100"],
        ["--images-per-core", "9", "--measure-loader"],
    ],
)
def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*PLAN, *arguments])
    assert ended.value.code == 2
    assert (
        f"argument {arguments[-2] if len(arguments) == 2 else '--measure-loader'}" in capsys.readouterr().err
    )


def test_memory_is_as_it_is_written() -> None:
    assert memory("80GB") == 80e9
    assert memory("80 GiB") == 80 * 2**30
    assert memory("1.5tb") == 1.5e12
    assert memory("500MB") == 5e8


def shown() -> list[str]:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^fastjepa (plan .+)$", text, re.MULTILINE)


def test_the_docs_show_commands() -> None:
    assert len(shown()) >= 3


@pytest.mark.parametrize("command", shown())
def test_commands_of_the_docs(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)) == 0
    assert "redicted, not measured" in capsys.readouterr().out


def test_the_docs_name_every_recipe() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.name}`" in text
