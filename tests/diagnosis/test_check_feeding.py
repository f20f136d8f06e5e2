"""The loader beside the model."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fastjepa.diagnosis.check_feeding import check_feeding, say_of_h100
from fastjepa.diagnosis.facts import Appetite, Loading
from tests.diagnosis.machines import HOST, WANTS

LOADING = Loading(one_core=200.0, images_per_second=1500.0, workers=8, decoder="pillow")
MODEL = Appetite(1000.0, "NVIDIA H100", "measured by 20 real steps of 256 images")


def test_a_loader_that_keeps_up() -> None:
    finding = check_feeding(LOADING, MODEL, HOST, WANTS)
    assert finding.level == "ok"
    assert "1,500 images/s are read by 8 workers" in finding.what
    assert "NVIDIA H100 eats 1,000 images/s, measured by 20 real steps" in finding.what


def test_more_workers_where_there_are_cores() -> None:
    finding = check_feeding(LOADING, replace(MODEL, images_per_second=2500.0), HOST, WANTS)
    assert finding.level == "warn"
    assert "would wait 40% of the time" in finding.what
    assert finding.do == "speed.workers=14"


def test_cheaper_images_where_there_are_not() -> None:
    finding = check_feeding(LOADING, replace(MODEL, images_per_second=4000.0), HOST, WANTS)
    for change in (
        "22 workers, and there are 16 cores",
        "fastjepa data pack",
        "torchvision",
        "augment=device",
    ):
        assert change in finding.do
    packed = replace(WANTS, is_packed=True, augment="device")
    done = replace(LOADING, decoder="torchvision")
    finding = check_feeding(done, replace(MODEL, images_per_second=4000.0), HOST, packed)
    assert "a host with more cores" in finding.do


def test_ranks_share_the_cores() -> None:
    """8 ranks with 8 workers are 64 processes on 16 cores, which read what 16 do."""
    eight = replace(WANTS, ranks=8)
    finding = check_feeding(LOADING, replace(MODEL, images_per_second=500.0), HOST, eight)
    assert finding.level == "warn"
    assert "3,200 images/s are read" in finding.what
    assert "eats 4,000 images/s" in finding.what


def test_without_workers_the_model_waits_for_every_image() -> None:
    alone = replace(LOADING, workers=0, images_per_second=200.0)
    finding = check_feeding(alone, replace(MODEL, images_per_second=100.0), HOST, WANTS)
    assert finding.level == "warn"
    assert "33%" in finding.what
    assert finding.do == "speed.workers=1"
    assert check_feeding(alone, replace(MODEL, images_per_second=2.0), HOST, WANTS).level == "ok"


@given(
    one_core=st.floats(1, 1e4),
    share=st.floats(0.1, 1),
    workers=st.integers(0, 32),
    eats=st.floats(1, 1e6),
    ranks=st.integers(1, 8),
)
def test_a_hungry_model_is_always_told_what_to_do(
    one_core: float, share: float, workers: int, eats: float, ranks: int
) -> None:
    loading = Loading(one_core, one_core * max(1.0, workers * share), workers, "torchvision")
    finding = check_feeding(
        loading, replace(MODEL, images_per_second=eats), HOST, replace(WANTS, ranks=ranks)
    )
    assert (finding.level == "warn") == bool(finding.do)
    if finding.do.startswith("speed.workers="):
        wanted = int(finding.do.partition("=")[2])
        assert wanted != workers
        assert wanted * ranks <= HOST.cores
        assert wanted * one_core >= eats


def test_of_a_gpu_that_is_not_here() -> None:
    finding = say_of_h100(LOADING, replace(MODEL, device="an H100", how="not measured"), HOST)
    assert finding.level == "ok"
    assert "an H100 would eat up to 1,000 images/s, not measured: 6 loader workers" in finding.what
