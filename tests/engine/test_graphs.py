"""When a graph runs, captures and replays. What it computes is tested on a GPU, in tests/gpu/test_step.py."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.config import ConfigError, parse_config
from fastjepa.engine import graphs
from fastjepa.engine.build import build_model
from fastjepa.engine.graphs import WARM_UP, Graphed, GraphedStep
from fastjepa.masks import Masks
from fastjepa.objectives import JEPA, Step
from tests.engine.test_agreement import Case, config_of, loader_of


class Recorded:
    """Stands in for a CUDA graph: capturing computes nothing, replaying computes into the same memory."""

    capturing: "Recorded | None" = None

    def __init__(self) -> None:
        self.replays: list[Any] = []

    def replay(self) -> None:
        for compute in self.replays:
            compute()


POOL = object()


class Stream:
    def wait_stream(self, other: object) -> None:
        assert other is not self


@contextmanager
def capture(graph: Recorded, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    assert pool is POOL
    assert isinstance(stream, Stream)
    Recorded.capturing = graph
    try:
        yield
    finally:
        Recorded.capturing = None


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    present = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: present)


class Counter:
    """A function with a state on the device: it gives input times the number of calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.captures = 0

    def __call__(self, x: Tensor, masks: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        context = masks["context"]
        assert context is not None
        out = torch.full_like(x, torch.nan)

        def compute() -> None:
            self.calls += 1
            out.copy_(x * self.calls + context)

        if Recorded.capturing is None:
            compute()
        else:
            self.captures += 1
            Recorded.capturing.replays.append(compute)
        return out, {"out": out}


def test_every_call_counts_once() -> None:
    function = Counter()
    graphed = Graphed(function)
    for call in range(1, 10):
        x, context = torch.randn(3), torch.randn(3)
        out, more = graphed(x, {"context": context, "cu_seqlens": None})
        assert torch.equal(out, x * call + context)
        assert torch.equal(more["out"], out)
        assert function.calls == call
        assert function.captures == (call > WARM_UP)


def test_another_shape_is_refused() -> None:
    graphed = Graphed(Counter())
    for _ in range(WARM_UP + 1):
        graphed(torch.ones(3), {"context": torch.ones(3)})
    with pytest.raises(ValueError, match=r"made for \[3\] torch.float32, got \[4\] .*cuda_graph none"):
        graphed(torch.ones(4), {"context": torch.ones(3)})


def test_a_step_s_loss_outlives_the_next_step() -> None:
    def step(images: Tensor, masks: Masks) -> tuple[Tensor, Step]:
        assert masks.asked_rows is not None
        loss = torch.zeros(())

        def compute() -> None:
            loss.copy_(images.sum() + masks.context.sum())

        compute() if Recorded.capturing is None else Recorded.capturing.replays.append(compute)
        return loss, Step(loss, images, images)

    graphed, losses, expected = GraphedStep(step), [], []
    for number in range(8):
        images, index = torch.full((2,), float(number)), torch.full((1, 2), 10 * number)
        loss, out = graphed(images, Masks(index, index, None, index, index))
        losses.append(loss)
        expected.append(float(images.sum() + index.sum()))
        assert torch.equal(out.prediction, images)
        assert float(out.loss) == expected[-1]
    assert [float(loss) for loss in losses] == expected


def test_parts_run_where_they_fit_and_the_modules_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def make(modules: tuple[Any, ...], _arguments: Any) -> None:
        for module in modules:

            def graphed(
                *tensors: Tensor, inner: Any = module.inner.forward, name: str = type(module.inner).__name__
            ) -> Any:
                calls.append(name)
                return inner(*tensors)

            module.forward = graphed

    monkeypatch.setattr(graphs, "_make_graphed", make)
    monkeypatch.setattr(graphs, "Graphed", lambda function: function)
    config = config_of(Case(1, 0, 1))
    model, batches = build_model(config), loader_of(config)
    assert isinstance(model, JEPA)
    images, masks = (batch := next(batches)).images, batch.masks
    expected = model.step(model.trainable(), images, masks).loss
    graphs.graph_parts(model, images, masks)
    other = next(batches)
    for given in (batch, other):
        loss = model.step(model.trainable(), given.images, given.masks).loss
        assert given is other or torch.equal(loss, expected)
        loss.backward()
        assert calls == ["VisionTransformer", "Predictor"]
        calls.clear()
    assert all(parameter.grad is not None for parameter in model.trainable().parameters())
    with torch.no_grad():
        model.encoder(images, masks.context)
    model.encoder(images[:4])
    model.encoder(images, masks.context, final_norm=False)
    model.predictor(model.encoder(images[:4], masks.context[:4]), masks.context[:4], masks.targets[:, :4])
    assert not calls


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"masks": {"mode": "packed"}, "speed": {"cuda_graph": "parts"}},
            "parts needs masks.mode budget, whose shapes never change, got packed",
        ),
        (
            {"masks": {"mode": "truncate"}, "speed": {"cuda_graph": "parts"}},
            "got truncate: use that mode, or speed.cuda_graph step or none$",
        ),
        (
            {"masks": {"mode": "truncate"}, "speed": {"cuda_graph": "parts", "zero_stage": 1}},
            "got truncate: use that mode, or speed.cuda_graph none$",
        ),
        ({"speed": {"zero_stage": 1}}, "step needs speed.zero_stage 0 on one device, got stage 1"),
        ({"speed": {"accumulation": 2}}, "step captures one micro-batch, got speed.accumulation 2"),
        ({"speed": {"checkpoint_blocks": True}}, "step cannot capture speed.checkpoint_blocks"),
        ({"speed": {"device": "cpu"}}, "step needs a GPU, and speed.device is cpu"),
        (
            {"objective": {"name": "mae"}, "speed": {"cuda_graph": "parts"}},
            "parts is for objective.name jepa: use step or none$",
        ),
        (
            {"objective": {"name": "mae"}, "speed": {"cuda_graph": "parts", "accumulation": 2}},
            "parts is for objective.name jepa: use none$",
        ),
        ({"speed": {"zero_stage": 1}, "objective": {"name": "mae"}}, "that stage, or speed.cuda_graph none$"),
        (
            {"speed": {"zero_stage": 1, "accumulation": 2}},
            "stage and speed.accumulation 1, or .* parts or none$",
        ),
        ({"speed": {"accumulation": 2}}, "use 1, or speed.cuda_graph parts or none$"),
        ({"speed": {"accumulation": 2}, "optim": {"precision": "fp32"}}, "use 1, or speed.cuda_graph none$"),
        ({"speed": {"accumulation": 2}, "masks": {"mode": "packed"}}, "use 1, or speed.cuda_graph none$"),
    ],
)
def test_what_no_graph_can_hold_is_refused(changes: dict[str, dict[str, Any]], said: str) -> None:
    speed = {"cuda_graph": "step", "zero_stage": 0} | changes.get("speed", {})
    with pytest.raises(ConfigError, match=said):
        parse_config(changes | {"speed": speed})


def test_what_a_graph_can_hold_is_taken() -> None:
    whole: dict[str, Any] = {"cuda_graph": "step", "zero_stage": 0}
    parse_config({"speed": whole})
    parse_config({"speed": whole, "objective": {"name": "mae"}, "masks": {"mode": "truncate"}})
    for mode in ("truncate", "packed"):
        parse_config({"speed": whole, "masks": {"mode": mode}})
    parse_config({"speed": {"cuda_graph": "parts", "zero_stage": 2, "accumulation": 4}})


def test_masks_of_few_shapes_share_what_they_can() -> None:
    """Of each shape the first call runs as it is (of the first shape three), the second is captured."""
    seen: list[tuple[int, bool]] = []

    def step(images: Tensor, masks: Masks) -> tuple[Tensor, Step]:
        seen.append((len(masks.context), Recorded.capturing is not None))
        return images.sum(), Step(images.sum(), images)

    graphed, images = GraphedStep(step, buckets=True), torch.zeros(2)
    for kept in (5, 3, 8, 7, 9, 5, 12, 16, 1):  # of two images: 16 tokens, from 9 on 32
        graphed(images, Masks(torch.zeros(2, kept).long(), torch.zeros(1, 2, 4).long()))
    assert seen == [(16, False)] * 3 + [(16, True), (32, False), (32, True)]
    buffers = {id(graph._inputs[0]) for graph in graphed._by_shape.values()}
    assert len(buffers) == 1, "one buffer of images for all"


class Memory:
    """A step for which there is not always room: its loss is the number of steps that were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self.too_large: set[tuple[int, bool]] = set()  # tokens, and whether while capturing
        self.returned: list[str] = []
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.returned.append(name))

    def step(self, images: Tensor, masks: Masks) -> tuple[Tensor, Step]:
        if (len(masks.context), Recorded.capturing is not None) in self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        loss = torch.zeros(())

        def compute() -> None:
            self.taken += 1
            loss.fill_(self.taken)

        compute() if Recorded.capturing is None else Recorded.capturing.replays.append(compute)
        return loss, Step(loss, images)


def of_tokens(tokens: int) -> Masks:
    """Of two images; brought to 16, 32, 48 … tokens."""
    return Masks(torch.zeros(2, tokens).long(), torch.zeros(1, 2, 4).long())


@pytest.mark.parametrize("capturing", [False, True])
def test_without_memory_for_one_more_shape_steps_go_on_without_graphs(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    memory, images = Memory(monkeypatch), torch.zeros(2)
    graphed = GraphedStep(memory.step, buckets=True)
    losses = [float(graphed(images, of_tokens(5))[0]) for _ in range(5)]
    memory.too_large = {(32, capturing)}
    if capturing:
        losses.append(float(graphed(images, of_tokens(12))[0]))
    with pytest.warns(UserWarning, match=r"one more shape beside 1 \(CUDA out of memory\)") as warned:
        losses += [float(graphed(images, of_tokens(tokens))[0]) for tokens in (12, 5, 12, 20)]
    assert len(warned) == 1
    assert losses == list(range(1, len(losses) + 1)), "no step is lost, and none is taken twice"
    assert memory.returned == ["synchronize", "empty_cache"]
    assert not graphed._by_shape
    assert graphed._shared is None


def test_a_step_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, images = Memory(monkeypatch), torch.zeros(2)
    memory.too_large = {(16, False)}
    with pytest.raises(torch.OutOfMemoryError):
        GraphedStep(memory.step, buckets=True)(images, of_tokens(5))
    assert not memory.returned
