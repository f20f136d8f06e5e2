"""What must be so of the scale model whatever its numbers, and what its command writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scale_model.__main__ import main
from bench.scale_model.measured import load
from bench.scale_model.networks import named_network, published_masks
from bench.scale_model.predict import Options, base_of, image_flop, predict
from bench.scale_model.traffic import Cluster, Message, collective_s, exposed_s, messages
from fastjepa.planning.memory import BF16, STAGES, Split
from fastjepa.planning.networks import Group
from fastjepa.planning.tokens import seen_in

numels = st.lists(st.integers(1, 1 << 22), min_size=1, max_size=6).map(tuple)
groups = st.builds(lambda encoder, other: (Group(encoder, True), Group(other, False)), numels, numels)
ranks = st.integers(1, 4096)
payloads = st.floats(1, 1e10)
clusters = st.builds(
    Cluster,
    gpus_per_node=st.sampled_from((1, 4, 8)),
    node_bytes_per_s=st.floats(1e10, 1e12),
    network_bytes_per_s=st.floats(1e9, 1e11),
    ring=st.sampled_from(("hierarchical", "flat")),
)


@given(payloads, ranks, clusters)
def test_collectives(payload: float, n: int, cluster: Cluster) -> None:
    seconds = {kind: collective_s(kind, payload, n, cluster) for kind in ("all-reduce", "all-gather")}
    scattered = collective_s("reduce-scatter", payload, n, cluster)
    assert seconds["all-reduce"] == pytest.approx(scattered + seconds["all-gather"])
    assert (n == 1) == (scattered == 0)
    assert collective_s("all-gather", 2 * payload, n, cluster) >= seconds["all-gather"]
    if n <= cluster.gpus_per_node:
        other = replace(cluster, ring="flat" if cluster.ring == "hierarchical" else "hierarchical")
        assert collective_s("all-gather", payload, n, other) == pytest.approx(seconds["all-gather"])
    slowest = max(cluster.node_bytes_per_s, cluster.gpus_per_node * cluster.network_bytes_per_s)
    assert seconds["all-gather"] * slowest >= payload * (n - 1) / n * (1 - 1e-9)


sent = st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 50)), min_size=1, max_size=2)


@given(sent, st.floats(0, 100), st.floats(0, 100))
def test_one_piece_of_each_message_is_always_seen(
    pieces: list[tuple[float, int]], a: float, b: float
) -> None:
    first, whole = sum(each for each, _ in pieces), sum(each * count for each, count in pieces)
    little, much = (exposed_s(pieces, each) for each in sorted((a, b)))
    assert first <= much <= little <= whole * (1 + 1e-9)
    assert exposed_s(pieces, 0.0) == pytest.approx(whole)


@given(groups, st.integers(2, 4096), st.sampled_from(STAGES), st.sampled_from(("deepspeed", "bucketed")))
def test_no_stage_sends_less_than_every_gradient(
    cut_groups: tuple[Group, ...], n: int, stage: int, schedule: str
) -> None:
    split = Split(stage, n, 1 << 20)
    found: list[Message] = messages(cut_groups, split, 12, schedule=schedule)  # type: ignore[arg-type]
    numel = sum(group.numel for group in cut_groups)
    assert found[0].payload >= BF16 * numel
    assert sum(each.payload for each in found) >= BF16 * numel * (1 if stage == 0 else 2)
    if stage < 2 and schedule == "deepspeed":
        assert found[0].behind == "nothing"


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(STAGES), st.sampled_from((8, 64, 512)), st.sampled_from((8, 16)))
def test_a_step_is_no_shorter_than_what_it_computes(stage: int, gpus: int, batch: int) -> None:
    base = base_of(named_network("base", 16), load())
    device = predict(base, stage, gpus, batch, Options(launch_s=0.0))
    launched = predict(base, stage, gpus, batch, Options(launch_s=1e-4))
    assert device.compute_s < device.step_s < launched.step_s
    assert device.exposed_s <= device.sent_s * (1 + 1e-9)
    assert device.images_per_s == pytest.approx(gpus * batch / device.step_s)
    assert 0 < device.efficiency < 1.05
    faster = Cluster(network_bytes_per_s=1e12, network_latency_s=1e-7)
    assert predict(base, stage, gpus, batch, Options(faster, launch_s=0.0)).step_s <= device.step_s


def test_a_batch_that_does_not_fit_goes_in_micro_batches() -> None:
    base = base_of(named_network("huge", 14), load())
    tight = Options(launch_s=0.0, usable=0.3)
    assert predict(base, 2, 8, 256, tight).accumulation > 1
    refused = predict(base, 0, 8, 256, tight)
    assert (refused.accumulation, refused.fits) == (1, False)


def test_of_a_step_alone_the_time_is_the_measured_one() -> None:
    """But for the masks: those that were measured may hold a little more or less than the mean."""
    base = base_of(named_network("large", 16), load())
    measured = base.measured
    alone = predict(base, 0, 1, measured.batch, Options())
    work = (
        image_flop(base.network, seen_in(published_masks(base.network), measured.batch))
        / measured.useful_flop
    )
    assert alone.step_s == pytest.approx((measured.step_s - base.update_s) * work + base.update_s)
    assert (alone.exposed_s, alone.host_s) == (0, 0)
    assert alone.efficiency == pytest.approx(1)


def test_it_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "images" / "scale.png"
    assert main(["--out", str(tmp_path), "--picture", str(picture), "--global-batch", "64"]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "scale_model.md").read_text(encoding="utf-8")
    assert "Nothing here was run on more than one GPU" in page
    assert page.count("† ") > 0
    content = json.loads((tmp_path / "scale_model.json").read_text(encoding="utf-8"))
    assert {each["network"] for each in content["scalings"]} == {"B/16", "L/16", "H/14", "g/16"}
    guessed = any(not each["compute_is_measured"] for each in content["scalings"])
    assert ("never measured" in page) == guessed
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in (tmp_path / "scale_model.md", tmp_path / "scale_model.json", picture):
        assert f"Wrote {name}" in said
