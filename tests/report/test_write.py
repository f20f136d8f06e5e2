"""The page of a run folder with real images and the features of an untrained encoder."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.masks import MultiBlockMasks
from fastjepa.report import write_report

PROBE = [
    {"name": "raw pixels", "knn_top1": 0.80, "linear_top1": 0.836, "rankme": None, "target_std": None},
    {"name": "untrained encoder", "knn_top1": 0.67, "linear_top1": 0.74, "rankme": 27.0, "target_std": 0.7},
    {
        "name": "trained target encoder",
        "knn_top1": 0.83,
        "linear_top1": 0.86,
        "rankme": 60.0,
        "target_std": 0.8,
    },
]
SUMMARY = {
    "name": "shoes & <shirts>",
    "objective": "jepa",
    "steps": 100,
    "images": 12800,
    "train_s": 64.0,
    "precision": "fp32",
    "device": "CPU",
    "versions": {"torch": "2.14.1"},
    "probe": PROBE,
    "probe_note": "",
}
HEALTHY = {"target_std": 0.7, "between_image_std": 0.3, "token_rankme": 30.0, "prediction_std": 0.5}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has ended."""
    (tmp_path / "config.yaml").write_text("model:\n  size: tiny  # <- & more\n")
    rows = [
        {
            "step": s,
            "images": 128 * s,
            "loss": 0.4 - 0.002 * s,
            "lr": 1e-5 * s,
            "weight_decay": 0.04,
            "momentum": 0.996,
        }
        | {"images_per_second": 200.0, "data_wait_fraction": 0.01, "linear_top1": 0.7 + 0.001 * s}
        | HEALTHY
        for s in range(0, 101, 10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "report" / "snapshots"
    folder.mkdir(parents=True)
    images = FashionMNIST(split="test").images[:6]
    patches = torch.nn.functional.unfold(images.float() / 255, 4, stride=4).mT  # [6, 49, 16]
    masks = MultiBlockMasks(grid=(7, 7), mode="budget", seed=0).sample(torch.arange(6))
    for step in (0, 100):
        weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        save_file(
            {
                "images": images,
                "features": (patches @ weight).half(),
                "context": masks.context.long().contiguous(),
                "targets": masks.targets.long().contiguous(),
            },
            folder / f"step_{step:08d}.safetensors",
            metadata={"grid": "7,7", "step": str(step)},
        )
    (tmp_path / "report" / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


class Page(HTMLParser):
    """Collects what the tests ask for, and that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text())


def test_a_finished_run_has_every_part(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert page.headings == [
        "Trained encoder against baselines",
        "All numbers",
        "Loss",
        "Linear probe over training",
        "Effective rank",
        "Spread of the features",
        "Speed",
        "Schedules",
        "Masks as sampled",
        "Patch features as colours",
        "Predictions, neighbours and attention",  # which these snapshots lack, and which it says
    ]
    assert "The snapshot of step 100 has none of it" in page.text
    assert "shoes & <shirts>" in page.text
    assert "trained without labels: from the part of an image that it sees, it is to predict" in page.text
    assert "size: tiny  # <- & more" in page.text
    assert "beats raw pixels by linear probe and kNN" in page.text
    assert "Warning" not in page.text
    assert "missing" not in page.text


def test_the_page_needs_nothing_else(run_dir: Path) -> None:
    path = write_report(run_dir)
    html = path.read_text()
    assert path == run_dir / "report" / "index.html"
    assert "<script" not in html
    assert "http" not in html
    assert "url(" not in html
    sources = [value for name, value in Page(html).attributes if name == "src"]
    links = [value or "" for name, value in Page(html).attributes if name == "href"]
    assert links.pop(0) == "data:,"  # no icon, so that none is asked for
    assert all(link.startswith("#") for link in links)
    pngs = {base64.b64decode((source or "").removeprefix("data:image/png;base64,")) for source in sources}
    assert len(sources) == 11
    assert pngs == {file.read_bytes() for file in (run_dir / "report").glob("*.png")}
    assert not list((run_dir / "report").glob("*.tmp"))


def test_a_run_still_going_says_what_is_missing(run_dir: Path) -> None:
    (run_dir / "report" / "summary.json").unlink()
    (run_dir / "report" / "snapshots" / "step_00000100.safetensors").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    page = page_of(run_dir)
    assert "has not been probed" in page.text
    assert "There is no report/summary.json" in page.text
    assert "at step 100" in page.text
    assert {"Loss", "Masks as sampled", "Patch features as colours"} <= set(page.headings)


def test_a_verdict_from_before_a_run_was_taken_up_again_says_so(run_dir: Path) -> None:
    (run_dir / "report" / "summary.json").write_text(json.dumps(SUMMARY | {"planned_steps": 200}))
    row = {"step": 120, "images": 15360, "linear_top1": 0.75}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    text = page_of(run_dir).text
    assert "At step 100, where the run had ended before it was taken up again: the trained target" in text
    assert "So far, at step 120" in text


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.headings == []
    assert "There is no metrics.jsonl" in page.text


def test_the_page_of_a_mae_speaks_of_no_target(run_dir: Path) -> None:
    rows = [
        row if row["name"] != "trained target encoder" else row | {"name": "trained encoder"} for row in PROBE
    ]
    (run_dir / "report" / "summary.json").write_text(
        json.dumps(SUMMARY | {"objective": "mae", "probe": rows})
    )
    for path in (run_dir / "report" / "snapshots").iterdir():
        tensors = load_file(path)
        tensors["targets"] = tensors["targets"][:1]
        save_file(tensors, path, metadata={"grid": "7,7", "step": str(int(path.stem[5:]))})
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"momentum": 0.996, ', ""))
    page = page_of(run_dir)
    alts = " ".join(value or "" for name, value in page.attributes if name == "alt")
    assert "target" not in page.text + alts
    assert "blocks" not in page.text + alts


def test_waiting_is_weighed_by_time(tmp_path: Path) -> None:
    """A first row of one slow step counts as the second it took."""
    rows = [
        {"step": 1, "images": 10, "elapsed_s": 1.0, "data_wait_fraction": 0.5},
        {"step": 100, "images": 1000, "elapsed_s": 100.0, "data_wait_fraction": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(tmp_path).text
    assert "0.5\N{NO-BREAK SPACE}%of training time waiting for data" in text


def test_without_labels_the_note_says_why(run_dir: Path) -> None:
    note = "The images have no labels, so nothing was probed."
    (run_dir / "report" / "summary.json").write_text(json.dumps(SUMMARY | {"probe": [], "probe_note": note}))
    page = page_of(run_dir)
    assert note in page.text
    assert "All numbers" not in page.headings


def test_collapse_is_warned_of_whatever_the_loss(run_dir: Path) -> None:
    row = {"step": 110, "images": 14080, "loss": 1e-4} | HEALTHY | {"target_std": 0.01}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert re.search(r"Warning:\s+the target says nearly the same about every token", page_of(run_dir).text)


def test_a_diverged_run_still_has_a_page(run_dir: Path) -> None:
    row = {"step": 110, "loss": float("nan")} | dict.fromkeys(HEALTHY, float("nan"))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    path = run_dir / "report" / "snapshots" / "step_00000100.safetensors"
    tensors = {
        "images": torch.zeros(6, 1, 28, 28, dtype=torch.uint8),
        "features": torch.full((6, 49, 24), torch.nan, dtype=torch.float16),
        "context": torch.zeros(6, 5, dtype=torch.int64),
    }
    save_file(tensors, path, metadata={"grid": "7,7", "step": "100"})
    text = page_of(run_dir).text
    assert "the features are not finite" in text
    assert "Left out: step 100, whose features are not finite: the run had diverged." in text
    assert "Everything outside is to be predicted" in text


@pytest.mark.parametrize("bad", [0, 50, 100])
def test_one_snapshot_without_features_costs_its_own_row(run_dir: Path, bad: int) -> None:
    folder = run_dir / "report" / "snapshots"
    tensors = load_file(folder / "step_00000000.safetensors")
    good = [step for step in (0, 50, 100) if step != bad]
    for step in (bad, *good):
        tensors["features"] = torch.randn(6, 49, 24, generator=torch.Generator().manual_seed(step)).half()
        if step == bad:
            tensors["features"][3, 2, 1] = torch.nan
        metadata = {"grid": "7,7", "step": str(step)}
        save_file(tensors, folder / f"step_{step:08d}.safetensors", metadata=metadata)
    page, names = page_of(run_dir), {0: "start", 50: "step 50", 100: "step 100"}
    assert f"Left out: {names[bad]}, whose features are not finite" in page.text
    alts = [value for name, value in page.attributes if name == "alt" and "as colours" in (value or "")]
    rows = ", ".join(names[step] for step in good)
    assert [str(alt).endswith(f"as colours: {rows}.") for alt in alts] == [True, True]


def test_features_of_other_images_have_no_row(run_dir: Path) -> None:
    path = run_dir / "report" / "snapshots" / "step_00000000.safetensors"
    tensors = load_file(path)
    tensors["images"] = 255 - tensors["images"]
    save_file(tensors, path, metadata={"grid": "7,7", "step": "0"})
    assert "Left out: start, which is of other images or patches than step 100." in page_of(run_dir).text
