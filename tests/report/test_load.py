import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastjepa.report.load import load_run


def test_an_empty_folder_is_all_notes(tmp_path: Path) -> None:
    run = load_run(tmp_path)
    assert run.summary.name == tmp_path.name
    assert run.metrics == run.snapshots == []
    assert len(run.notes) == 4
    assert any("no config.yaml" in note for note in run.notes)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.dir"):
        load_run(tmp_path / "nowhere")


def test_a_torn_last_line_is_no_news(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "lo')
    run = load_run(tmp_path)
    assert run.metrics == [{"step": 10, "loss": 0.5}]
    assert not any("JSON object" in note for note in run.notes)


def test_other_broken_lines_are_counted(tmp_path: Path) -> None:
    odd = ['{"step": "7"}', '{"step": Infinity}', '{"step": null}']
    lines = ['{"step": 10}', "", "[1, 2]", '{"loss": 1}', *odd, '{"step": 20}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run = load_run(tmp_path)
    assert [row["step"] for row in run.metrics] == [10, 20]
    assert any("no JSON object with a step: 6" in note for note in run.notes)


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": loss} for s, loss in ((10, 1.0), (20, 0.9), (30, 0.8), (20, 0.7), (30, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.metrics] == [(10, 1.0), (20, 0.7), (30, 0.6)]


@pytest.mark.parametrize("text", ['{"name": "half', "", "null", "[1]", '{"name": "run", "probe": 3}'])
def test_an_unreadable_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(text)
    run = load_run(tmp_path)
    assert any("report/summary.json cannot be read" in note for note in run.notes)


@pytest.mark.parametrize(
    ("judge", "count"),
    [
        ({"final_queries": 10_000, "images": 50}, 50),
        ({"final_queries": 40, "images": 50}, 40),
        ({"final_queries": 40}, 40),
        (None, None),
    ],
)
def test_how_many_images_were_judged(tmp_path: Path, judge: object, count: int | None) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(json.dumps({"name": "run", "judge": judge}))
    assert load_run(tmp_path).summary.judged_images == count


def test_an_accuracy_that_is_no_number_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(
        '{"name": "run", "probe": [{"name": "raw pixels", "knn_top1": NaN, "linear_top1": 0.5}]}'
    )
    (probe,) = load_run(tmp_path).summary.probes
    assert (probe.knn_top1, probe.linear_top1) == (None, 0.5)


def test_snapshots_come_by_step_and_broken_ones_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "report" / "snapshots"
    folder.mkdir(parents=True)
    tensors = {
        "images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        "features": torch.zeros(2, 4, 3, dtype=torch.float16),
        "context_flat": torch.tensor([0, 2, 3]),
        "cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32),
    }
    for step in (100, 0):
        name = f"step_{step:08d}.safetensors"
        save_file(tensors, folder / name, metadata={"grid": "2,2", "step": str(step)})
    (folder / "step_00000200.safetensors").write_bytes(b"torn")
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 100]
    assert [tokens.tolist() for tokens in run.snapshots[0].context] == [[0], [2, 3]]
    assert run.snapshots[0].targets is None
    assert run.snapshots[0].grid == (2, 2)
    assert any("step_00000200" in note for note in run.notes)
