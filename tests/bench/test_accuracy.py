"""The accuracy benchmark: what is added to images, bands and sentences, and the whole command, quickly."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.accuracy import plan, summary
from bench.accuracy.__main__ import CONFIGS, main
from bench.accuracy.corruptions import KINDS, MOST_NOISE, corrupt
from bench.accuracy.lanes import Lane
from bench.accuracy.plan import Condition, Task
from bench.accuracy.probes import judge
from bench.accuracy.store import Point, Result, Store
from bench.accuracy.summary import Band, CurvePoint
from fastjepa.config import Config, load_config
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.engine.build import build_masks, build_model, build_order
from fastjepa.engine.schedules import Schedule
from fastjepa.masks import Masks
from fastjepa.objectives import JEPA

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def garments() -> Tensor:
    return FashionMNIST().images


# ---------------------------------------------------------------------------------------- corruptions


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    strength=st.floats(0, 1),
    seed=st.integers(0, 1000),
    numbers=st.lists(st.integers(0, 30_000), min_size=2, max_size=6, unique=True),
)
def test_detail_is_a_function_of_seed_and_number(
    kind: str, strength: float, seed: int, numbers: list[int], garments: Tensor
) -> None:
    index = torch.tensor(numbers)
    images = garments[index % len(garments)]
    whole = corrupt(images, index, kind, strength, seed, garments)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    back = corrupt(images.flip(0), index.flip(0), kind, strength, seed, garments).flip(0)
    assert torch.equal(whole, back), "the company of an image must not matter"
    alone = corrupt(images[:1], index[:1], kind, strength, seed, garments)
    # Interpolation may round otherwise in another batch.
    assert (whole[:1].int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_image_and_more_changes_more(kind: str, garments: Tensor) -> None:
    images, numbers = garments[:200], torch.arange(200)
    assert torch.equal(corrupt(images, numbers, kind, 0.0, 3, garments), images)
    changed = [
        (corrupt(images, numbers, kind, strength, 3, garments).float() - images).abs().mean()
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(more > less for less, more in pairwise(changed))


@pytest.mark.parametrize("kind", KINDS)
def test_detail_differs_between_images_and_seeds(kind: str, garments: Tensor) -> None:
    same = garments[:1].expand(50, -1, -1, -1)
    made = corrupt(same, torch.arange(100, 150), kind, 0.8, 0, garments).flatten(1)
    assert len(made.unique(dim=0)) == 50
    others = corrupt(same, torch.arange(100, 150), kind, 0.8, 1, garments).flatten(1)
    assert (made != others).any(dim=1).all()


def test_noise_is_drawn_without_a_look_at_the_image(garments: Tensor) -> None:
    numbers = torch.arange(500)
    noise = corrupt(torch.zeros_like(garments[:500]), numbers, "noise", 1.0, 0)
    added = corrupt(garments[:500], numbers, "noise", 1.0, 0) - (1 - MOST_NOISE) * garments[:500]
    assert (added - noise).abs().max() <= 1, "but for rounding"
    values = noise / (255 * MOST_NOISE)
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.std() - math.sqrt(1 / 12)) < 0.01
    neighbours = torch.corrcoef(torch.stack([values[..., :-1].flatten(), values[..., 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_nothing_but_chance_can_be_read_from_noise(garments: Tensor) -> None:
    labels = FashionMNIST().labels
    nothing = torch.zeros_like(garments[:3000])
    noise = corrupt(nothing, torch.arange(3000), "noise", 1.0, 0).flatten(1).float().numpy()
    found = judge(noise[:2000], labels[:2000].numpy(), noise[2000:], labels[2000:3000].numpy(), 0)
    for accuracy in found.values():
        assert accuracy is not None
        assert accuracy < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 1000)


def test_texture_stays_behind_the_garment(garments: Tensor) -> None:
    images = garments[:300]
    made = corrupt(images, torch.arange(300), "texture", 1.0, 0)
    solid = images >= 64
    assert torch.equal(made[solid], images[solid])
    assert (made >= images).all()
    assert made[images == 0].float().std() > 40


def test_a_distractor_is_another_garment(garments: Tensor) -> None:
    three = garments[:3] * 0
    three[0] += 255  # the only donor that can be seen
    black = torch.zeros_like(garments[:200])
    numbers = torch.arange(200)
    made = corrupt(black, numbers, "distractor", 1.0, 0, three).flatten(1).amax(dim=1)
    assert made[0] == 0, "an image is no distractor of itself"
    part = (made[3:] > 0).float().mean()
    assert 0.2 < part < 0.5, "each donor is as likely as another"


@pytest.mark.parametrize(("kind", "strength"), [("fog", 0.5), ("noise", 1.5), ("noise", -0.1)])
def test_what_cannot_be_added_is_refused(kind: str, strength: float, garments: Tensor) -> None:
    with pytest.raises(ValueError, match="must"):
        corrupt(garments[:2], torch.arange(2), kind, strength, 0)


# ------------------------------------------------------------------------------------ plan and training


def recipe(objective: str, *overrides: str) -> Config:
    file = "fashion_mnist.yaml" if objective == "jepa" else "fashion_mnist_mae.yaml"
    return load_config(CONFIGS / file, ["model.depth=1", "model.width=32", "model.heads=2", *overrides])


@pytest.mark.parametrize("objective", plan.TRAINED)
def test_steps_see_what_the_samplers_draw_for_them(objective: str) -> None:
    config = plan.config_of(recipe(objective, "optim.global_batch=16"), seed=4, steps=30, images=200)
    spans = list(plan.epochs_of(config, 200))
    assert spans == [(0, 12), (12, 24), (24, 30)]
    order, sampler = build_order(config, 200), build_masks(config)
    for first, last in spans:
        drawn = plan.draw(config, 200, (first, last))
        for place, step in enumerate(range(first, last)):
            epoch, rows = order.batch(step)
            masks = sampler.sample(rows, epoch, step)
            for ours, theirs in zip(drawn, (rows, masks.context, masks.targets), strict=True):
                assert np.array_equal(ours[place], theirs.numpy())


@pytest.mark.parametrize("objective", plan.TRAINED)
def test_a_lane_takes_the_steps_of_a_plain_loop_run_after_run(objective: str, garments: Tensor) -> None:
    images, steps, count = garments[:64], 6, 64
    base = recipe(objective, "optim.global_batch=8", "optim.final_weight_decay=0.4")
    lane: Lane | None = None
    for seed in (1, 2):
        config = plan.config_of(base, seed, steps, count)
        draws = [plan.draw(config, count, span) for span in plan.epochs_of(config, count)]
        lane = lane or Lane(config, images, steps, torch.device("cpu"), draws[0])
        lane.start(config, images, draws, plan.rates(config, count))
        for _ in range(steps):
            lane.advance()
        wanted = plain_loop(config, images, steps)
        for name, ours in lane.model.state_dict().items():
            # The gradient of a key's bias is rounding and nothing else, which Adam turns into full steps.
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(ours, wanted[name], rtol=1e-4, atol=1e-5)


def plain_loop(config: Config, images: Tensor, steps: int) -> dict[str, Tensor]:
    """Two groups of AdamW with decays and rates set by hand. What both share is the model."""
    model, order, sampler = build_model(config), build_order(config, len(images)), build_masks(config)
    weights = list(model.trainable().parameters())
    optim = config.optim
    schedule = Schedule(
        steps=steps,
        warmup_steps=round(optim.warmup_epochs * order.steps_per_epoch),
        lr=optim.lr,
        start_lr=optim.start_lr,
        final_lr=optim.final_lr,
        weight_decay=optim.weight_decay,
        final_weight_decay=optim.final_weight_decay,
        momentum=optim.momentum,
        final_momentum=optim.final_momentum,
    )
    groups = [{"params": [w for w in weights if (w.ndim > 1) == decayed]} for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    for step in range(steps):
        now = schedule.at(step)
        for group, decay in zip(optimizer.param_groups, (now.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = now.lr, decay
        epoch, rows = order.batch(step)
        masks: Masks = sampler.sample(rows, epoch, step)
        optimizer.zero_grad()
        model.step(model.trainable(), images[rows], masks).loss.backward()
        optimizer.step()
        if isinstance(model, JEPA):
            model.update_target(now.momentum)
    return model.state_dict()


def test_clean_images_come_first_and_the_most_telling_strength_next() -> None:
    order = [str(one) for one in plan.conditions(["noise", "texture"], [0.75, 0.25])]
    assert order == ["clean", "noise-0.75", "texture-0.75", "noise-0.25", "texture-0.25"]


# -------------------------------------------------------------------------------- bands and sentences

fractions = st.floats(0, 1)


@given(st.lists(fractions, min_size=1, max_size=6))
def test_a_band_holds_what_it_is_of(values: list[float]) -> None:
    band = Band.of(values)
    assert band is not None
    assert band.low <= band.mean <= band.high
    assert all(band.low <= value <= band.high for value in values)
    assert band.overlaps(band)
    assert Band.of([]) is None


@given(st.lists(fractions, min_size=2, max_size=4), st.lists(fractions, min_size=2, max_size=4))
def test_a_comparison_names_the_leader_whichever_way_it_is_asked(a: list[float], b: list[float]) -> None:
    bands = {"jepa": Band.of(a), "mae": Band.of(b)}
    assert all(bands.values())
    known = {name: band for name, band in bands.items() if band is not None}
    said = summary.compare(known, "jepa", "mae")
    if known["jepa"].mean != known["mae"].mean:
        assert said == summary.compare(known, "mae", "jepa")
        leader = max(known, key=lambda name: known[name].mean)
        assert said.startswith(summary.NAMES[leader])
    assert ("overlap" in said and "do not overlap" not in said) == known["jepa"].overlaps(known["mae"])
    assert ("is ahead of" in said) != known["jepa"].overlaps(known["mae"])


@given(fractions, fractions, st.floats(1, 1e6), st.floats(1.1, 100), fractions)
def test_a_curve_is_read_between_its_points(
    low: float, high: float, flop: float, factor: float, part: float
) -> None:
    ends = [Band(low, low, low, 1), Band(high, high, high, 1)]
    points = [CurvePoint(0, flop, ends[0]), CurvePoint(0, flop * factor, ends[1])]
    band = summary.at_cost(points, "flop", min(flop * factor**part, flop * factor))
    assert band is not None
    assert band.mean == pytest.approx(low + part * (high - low), abs=1e-6)
    assert summary.at_cost(points, "flop", flop * factor * 2) is None


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), fractions)
def test_the_time_to_an_accuracy_is_where_the_curve_comes_to_stay_above_it(
    means: list[float], wanted: float
) -> None:
    points = [CurvePoint(2.0**i, 1, Band(mean, mean, mean, 2)) for i, mean in enumerate(means)]
    found = summary.seconds_to(points, wanted)
    assert (found is None) == (means[-1] < wanted)
    if found is not None:
        assert all(point.accuracy.mean >= wanted for point in points if point.seconds > found * (1 + 1e-9))
        assert found == 1 or any(p.accuracy.mean < wanted and found < 2.0001 * p.seconds for p in points)


def result(learner: str, seed: int, condition: Condition, linear: float | None) -> Result:
    points = [Point(100, 1.0, 1e9, linear, linear), Point(200, 2.0, 2e9, linear, linear)]
    return Result(learner, seed, condition.kind, condition.strength, points)


def made_up(loss_of: dict[str, float], spread: float = 0.0) -> list[Result]:
    """Two seeds; everybody starts at 0.8 ± spread and loses so much under noise."""
    return [
        result(
            learner,
            seed,
            condition,
            0.8 - (lost if condition.strength else 0) + spread * sign * condition.strength,
        )
        for learner, lost in loss_of.items()
        for seed, sign in ((0, -1), (1, 1))
        for condition in (Condition(), Condition("noise", 0.5))
    ]


def test_the_verdict_follows_the_numbers() -> None:
    *_, numbers, held, left = summary.verdict(made_up({"pixels": 0.1, "jepa": 0.2, "mae": 0.3}))
    assert held.startswith("Predicting representations held better than predicting pixels under all")
    assert "raw pixels 10.0 (10.0–10.0), I-JEPA 20.0 (20.0–20.0), MAE 30.0 (30.0–30.0)" in numbers
    assert left == "Of accuracy itself, I-JEPA has more left under noise-0.5."
    *_, lost, left = summary.verdict(made_up({"jepa": 0.3, "mae": 0.2}))
    assert "is not borne out" in lost
    assert "MAE loses less under noise" in lost
    assert "MAE has more left" in left
    *_, level, left = summary.verdict(made_up({"jepa": 0.2, "mae": 0.25}, spread=0.2))
    assert "is not borne out" in level
    assert "the bands overlap" in level
    assert "the bands overlap" in left


def test_one_seed_proves_nothing() -> None:
    results = [one for one in made_up({"jepa": 0.1, "mae": 0.3}) if one.seed == 0]
    said = summary.verdict(results)
    assert "with one seed" in said[0]
    assert "is not borne out" in said[-2]


def test_who_is_faster_is_said_in_seconds() -> None:
    def run(learner: str, seed: int, accuracies: list[float]) -> Result:
        points = [Point(i, 2.0**i, 1e9 * 2**i, x, x) for i, x in enumerate(accuracies)]
        return Result(learner, seed, plan.CLEAN, 0.0, points)

    results = [run("jepa", s, [0.1, 0.5, 0.7, 0.9]) for s in (0, 1)]
    results += [run("mae", s, [0.1, 0.2, 0.3, 0.5]) for s in (0, 1)]
    said = " ".join(summary.verdict(results))
    assert "To 50.0 %, where both stay, it took I-JEPA 2 s and MAE 8 s." in said
    assert "8 s of training each: I-JEPA is ahead of MAE, 90.0" in said


def test_a_run_that_diverged_counts_for_nobody() -> None:
    results = [*made_up({"jepa": 0.1, "mae": 0.2}), result("jepa", 2, Condition(), None)]
    band = summary.final(results, "jepa", Condition(), "linear_top1")
    assert band is not None
    assert band.seeds == 2
    assert judge(np.full((5, 2), np.nan), np.zeros(5), np.zeros((5, 2)), np.zeros(5), 0) == {
        "knn_top1": None,
        "linear_top1": None,
    }


def test_without_results_nothing_is_claimed() -> None:
    assert summary.verdict([]) == ["Nothing has been measured that could be compared."]


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = Task("mae", Condition("noise", 0.5), 3)
    assert not store.has(task)
    made = result("mae", 3, Condition("noise", 0.5), 0.5)
    store.save(made)
    assert store.has(task)
    assert store.results() == [made]


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_whole_benchmark_runs_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--device", "cpu", "--jobs", "1", "--side-by-side", "2"]
    arguments += ["--seeds", "3", "--results", str(tmp_path)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    command = [sys.executable, "-m", "bench.accuracy", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "cpu" / "accuracy"
    runs = sorted(path.stem for path in (folder / "runs").glob("*.json"))
    assert len(runs) == 2 * len(plan.LEARNERS)
    assert {"jepa_clean_seed3", "mae_noise-1_seed3"} <= set(runs)
    content = json.loads((folder / "accuracy.json").read_text())
    assert len(content["rows"]) == 2 * len(plan.LEARNERS)
    assert all(0 < row["linear_top1"]["mean"] <= 1 for row in content["rows"])
    for curve in content["curves"].values():
        assert [point["seconds"] for point in curve["knn_top1"]] == sorted(
            point["seconds"] for point in curve["knn_top1"]
        )
        assert len(curve["knn_top1"]) >= 4
    page = (folder / "accuracy.md").read_text()
    assert "not the step that `fit` runs" in page
    assert all(sentence in page for sentence in content["verdict"]["linear_top1"])
    for name in ("accuracy_seconds", "accuracy_flops", "detail", "detail_samples"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is left to do. With other settings: refused. And a report of half of it.
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert main(arguments) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert main([*arguments, "--steps", "17"]) == 2
    assert "other settings (steps)" in capsys.readouterr().err
    for path in stamps:
        if "mae" in path.stem:
            path.unlink()
    assert main(["--report", "--device", "cpu", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "untrained encoder" in said
    assert "MAE" not in said
    assert main(["--report", str(folder)]) == 0
    assert capsys.readouterr().out == said


def test_cuda_is_not_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
