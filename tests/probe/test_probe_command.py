"""`fastjepa probe` on real runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastjepa.cli import main
from fastjepa.config import parse_config
from fastjepa.engine.build import build_model
from fastjepa.engine.checkpoints.tensorfile import fingerprint
from fastjepa.evaluation.sweep import HEADS
from fastjepa.interop import save_official
from fastjepa.interop.start import load_trained
from fastjepa.probe.data import open_probe_images
from fastjepa.probe.extract import Wanted, extract, keeps_tokens, token_batches
from fastjepa.probe.protocols import Settings, check_settings
from fastjepa.probe.results import Result, read_result
from fastjepa.probe.subjects import ProbeError, open_trained, subject_of

FEW = ("--train-images", "120", "--test-images", "60", "--k", "5,20", "--epochs", "4",
       "--attentive-epochs", "2", "--splits", "2", "--device", "cpu")  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def probed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """A copy of the run, with the results of all protocols in it."""
    copy = tmp_path_factory.mktemp("probed") / "run"
    shutil.copytree(run, copy)
    assert main(["probe", str(copy), *FEW, "--protocol", "knn,linear,attentive,collapse"]) == 0
    return copy, {name: read_result(copy / "probe" / f"10-{name}.json") for name in ("target", "context")}


def test_every_protocol_has_its_rows(probed: tuple[Path, dict[str, Result]]) -> None:
    of_encoder = [
        ("knn", "k=5"),
        ("knn", "k=20"),
        ("linear", "last block"),
        ("linear", "last 4 blocks"),
        ("attentive", "1 query"),
    ]
    for encoder, result in probed[1].items():
        assert [row.key for row in result.rows if row.subject == f"{encoder} encoder"] == of_encoder
        assert [row.key for row in result.rows if row.subject == "random initialisation"] == of_encoder
        assert [row.key for row in result.rows if row.subject == "raw pixels"] == of_encoder[:3]
        for row in result.rows:
            assert row.images == 60
            assert row.interval.low <= row.accuracy <= row.interval.high
        assert result.collapse[f"{encoder} encoder"].keys() == {
            "std", "dead_dimensions", "rankme", "alpha_req", "uniformity", "lidar",
        }  # fmt: skip
        linear = result.of_subject()["linear", "last block"]
        assert len(linear.detail["held_out"]) == len(HEADS)


def test_the_target_and_the_context_encoder_are_not_taken_for_each_other(
    probed: tuple[Path, dict[str, Result]],
) -> None:
    copy, results = probed
    model, _ = load_trained(copy)
    trained = open_trained(copy)
    hashes = {name: result.checkpoint["encoder_sha256"] for name, result in results.items()}
    assert hashes["target"] != hashes["context"]
    for name in hashes:
        assert subject_of(trained, name, 4, CPU, torch.float32).fingerprint == hashes[name]
    assert results["target"].collapse["target encoder"] != results["context"].collapse["context encoder"]
    shared = [[row for row in r.rows if row.subject == "raw pixels"] for r in results.values()]
    assert shared[0] == shared[1]


def test_the_same_again_gives_the_same_and_overwrites_only_when_told(
    probed: tuple[Path, dict[str, Result]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, results = probed
    command = ["probe", str(copy), *FEW, "--protocol", "knn,linear", "--encoder", "target"]
    before = (copy / "probe" / "10-target.json").read_bytes()
    assert main(command) == 1
    assert "10-target.json exists; --force replaces it, --out writes elsewhere" in capsys.readouterr().err
    assert (copy / "probe" / "10-target.json").read_bytes() == before
    out = tmp_path / "again.json"
    for extra in (["--cache", str(tmp_path / "cache")], ["--cache", str(tmp_path / "cache"), "--force"]):
        assert main([*command, "--out", str(out), *extra]) == 0
        found = read_result(out).rows
        wanted = [row for row in results["target"].rows if row.protocol in ("knn", "linear")]
        assert [(r.subject, r.key, r.correct) for r in found] == [
            (r.subject, r.key, r.correct) for r in wanted
        ]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_caches_are_computed_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["probe", str(run), *FEW, "--protocol", "knn", "--encoder", "target"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert main([*command, *cache, "--out", str(tmp_path / "a.json")]) == 0
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert main([*command, *cache, "--out", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().err.count("is damaged") == 2
    assert read_result(tmp_path / "a.json").rows == read_result(tmp_path / "b.json").rows


def test_tokens_kept_and_computed_again_are_alike(run: Path) -> None:
    subject = subject_of(open_trained(run), "target", 1, CPU, torch.float32)
    images = open_probe_images(["fashion_mnist"], None, 1, 0, train_images=90, test_images=10)
    settings: dict[str, Any] = {"blocks": 1, "tokens": True, "views": False, "device": CPU, "precision": ""}
    kept, again = Wanted(memory=2**24, **settings), Wanted(memory=2**15, **settings)
    assert keeps_tokens(subject, images, kept)
    assert not keeps_tokens(subject, images, again)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    found = []
    for wanted in (kept, again):
        part = extract([subject], images, wanted)["target encoder"].train
        batches = list(token_batches(subject, images.train, part, wanted, 40, order))
        found.append([torch.cat(parts) for parts in zip(*((t.float(), y) for t, y in batches), strict=True)])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=2e-3)


def test_features_that_are_not_finite_are_refused(run: Path) -> None:
    subject = subject_of(open_trained(run), "target", 1, CPU, torch.float32)
    diverged = replace(subject, blocks=lambda images: [subject.blocks(images)[0] * torch.nan])
    images = open_probe_images(["fashion_mnist"], None, 1, 0, train_images=30, test_images=10)
    wanted = Wanted(blocks=1, tokens=False, views=False, memory=2**24, device=CPU, precision="")
    with pytest.raises(ProbeError, match="features of the target encoder are not finite"):
        extract([diverged], images, wanted)


def test_pixels_that_do_not_fit_are_left_out_and_said_to_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    command = ["probe", str(run), *FEW, "--protocol", "knn", "--encoder", "target", "--out", str(out)]
    assert main([*command, "--memory", "0.0002"]) == 0
    assert "raw pixels are left out" in capsys.readouterr().out
    assert {row.subject for row in read_result(out).rows} == {"target encoder", "random initialisation"}


def test_few_labels_of_a_folder(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "low.json"
    command = ["probe", str(run), "--encoder", "context", "--data", str(folder), "--device", "cpu"]
    assert main([*command, "--splits", "3", "--protocol", "low-shot", "--out", str(out)]) == 0
    row = read_result(out).of_subject()["low-shot", "10%"]
    assert (row.splits, row.images, len(row.detail["of_splits"])) == (3, 10, 3)
    printed = capsys.readouterr().out
    assert "low-shot 1%" in printed
    assert f"Wrote {out}" in printed


def test_a_published_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"size": "tiny", "depth": 4, "patch_size": 7, "predictor_depth": 1}
    data = {"image_size": 28, "channels": 3}
    file = tmp_path / "encoder.pth.tar"
    save_official(build_model(parse_config({"model": model, "data": data})), file)
    out = tmp_path / "published.json"
    command = ["probe", str(file), "--device", "cpu", "--protocol", "knn", "--k", "5", "--encoder", "target"]
    for arguments, said in (
        (["--data", str(folder)], "belongs to no run, whose folder would hold the result: give --out FILE"),
        (["--out", str(out)], "a file does not say which images to use: give --data FOLDER"),
    ):
        assert main([*command, *arguments]) == 1
        assert said in capsys.readouterr().err
    config = transformers.ViTConfig(
        image_size=14, patch_size=7, num_channels=1, hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    baseline = f"hf:{tmp_path / 'vit'}"
    command += ["--data", "fashion_mnist", *FEW[:4], "--out", str(out), "--force", "--baseline", baseline]
    assert main([*command, "--blocks", "1", "--precision", "bf16"]) == 0
    result = read_result(out)
    assert baseline in {row.subject for row in result.rows}
    assert main([*command[:-2], "--precision", "fp32"]) == 0
    result = read_result(out)
    assert result.data["classes"][0] == "T-shirt/top"  # grey images, for an encoder of colours
    assert {row.subject for row in result.rows} == {"target encoder", "raw pixels", "random initialisation"}
    assert result.of_subject()["knn", "k=5"].accuracy > 0.3


def test_compare_prints_differences(
    probed: tuple[Path, dict[str, Result]], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, results = probed
    files = [str(copy / "probe" / f"10-{name}.json") for name in ("target", "context", "target")]
    assert main(["probe", "--compare", *files]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("linear last block"))
    first, second = (
        results[name].of_subject()["linear", "last block"].accuracy for name in ("target", "context")
    )
    assert f"{100 * (second - first):+.1f} ±" in line
    assert "+0.0 ±0.0" in line  # the third is the first
    assert "McNemar" in printed
    assert main(["probe", "--compare", files[0]]) == 1
    assert "needs two results or more" in capsys.readouterr().err
    assert main(["probe", "--compare", str(copy), str(copy / "checkpoints")]) == 1
    assert "there is no result of target or context" in capsys.readouterr().err


def test_what_does_not_fit_is_named_and_nothing_is_written(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    state = mixed / "checkpoints" / "step_00000010" / "state.json"
    content = json.loads(state.read_text())
    content["config"]["model"]["width"] = 64
    state.write_text(json.dumps(content))
    manifest = state.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    entries.pop("state.json", None)
    entries["state.json"] = fingerprint(state)._asdict()
    manifest.write_text(json.dumps(entries))
    mae = tmp_path / "mae.pth"
    small = {"size": "tiny", "depth": 1, "patch_size": 7, "decoder_depth": 1}
    configured = {"model": small, "data": {"image_size": 28}, "objective": {"name": "mae"}}
    save_official(build_model(parse_config(configured)), mae)
    odd = tmp_path / "odd.pth.tar"
    save_official(load_trained(run)[0], odd)
    by_others = torch.load(odd, weights_only=True)
    del by_others["fastjepa_heads"]
    torch.save(by_others, odd)
    one = ["--encoder", "target", "--out", str(tmp_path / "no.json")]
    data = ["--data", str(folder)]
    for arguments, said in (
        ([str(tmp_path / "nowhere"), *one], "is no checkpoint, and no run folder with one"),
        ([str(mixed), *one], "holds another architecture than it should"),
        ([str(mae), *one], "was trained with MAE, which has no target encoder: use --encoder context"),
        ([str(mae), "--out", one[-1]], "the context encoder has 1: use --blocks 1"),
        ([str(odd), *one, *data], "the heads of an encoder of width 32 are not known: give --heads"),
        ([str(run), *one, "--blocks", "6"], "the target encoder has 4: use --blocks 4"),
        ([str(run), *one, *data], "k of 100 neighbours, and the bank holds 50 images: use --k 10,20"),
        ([str(run), *one, "--data", str(folder / "bag")], "has no classes to tell apart"),
        ([str(run), *one, *data, "--train-images", "3"], "3 images to learn from hold 3 of 5 classes"),
        ([str(run), *one, "--memory", "0.00001"], "are allowed: raise --memory"),
        ([str(run), "--out", one[-1]], "--out is one file, and two encoders are probed"),
        ([str(run), "--encoder", "target", "--out", str(tmp_path)], "is a folder: give --out"),
        ([str(run), "--encoder", "target", "--out", str(mae / "x.json")], "is no folder that may be"),
        ([str(run), *one, "--splits", "11"], "--splits 11: an interval takes 2 to 10"),
        ([str(run), *one, "--baseline", "resnet"], "is none of timm:NAME"),
        ([str(run), "--compare", str(run), str(run)], "give a RUN_OR_CHECKPOINT to probe, or --compare"),
        ([], "give a RUN_OR_CHECKPOINT to probe, or --compare"),
    ):  # fmt: skip
        assert main(["probe", *arguments]) == 1, arguments
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "no.json").exists()
    assert not (run / "probe").exists()


@pytest.mark.parametrize(
    ("protocol", "said"),
    [("linear", "there is one image of each class"), ("low-shot", "of the labels are 0 images")],
)
def test_one_image_of_each_class_is_too_few(protocol: str, said: str) -> None:
    settings = Settings(protocols=(protocol,))
    with pytest.raises(ProbeError, match=said):
        check_settings(settings, torch.arange(25))


def test_what_is_left_of_unreadable_images_is_looked_at_again(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "images")
    next((tmp_path / "images" / "bag").glob("*.png")).write_bytes(b"")
    command = ["probe", str(run), "--encoder", "target", "--data", str(tmp_path / "images"), str(folder)]
    out = ["--device", "cpu", "--protocol", "knn", "--k", "60", "--out", str(tmp_path / "x.json")]
    assert main([*command, *out]) == 1
    assert "k of 60 neighbours, and the bank holds 59 images" in capsys.readouterr().err
