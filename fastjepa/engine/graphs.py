"""CUDA graphs of a training step: the host launches one graph where it launched a thousand kernels.

A graph repeats the same kernels on the same memory. So shapes may not change, what comes in is copied to
where the graph reads it, and what comes out lies where the next replay will write. Nothing of a step may come
from the host: its rates and its counts are on the device. Masks of mode `budget` have one shape; those of the
others are brought to one of few, and there is a graph for each.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastjepa.masks import Masks
from fastjepa.masks.buckets import in_buckets
from fastjepa.objectives import JEPA, Step

WARM_UP = 3  # calls before the first capture: kernels are compiled, caches and workspaces filled
# Other threads (of the loader, of pinned memory) go on calling CUDA while a graph is captured.
_CAPTURE_MODE = "thread_local"


class Graphed:
    """A function of tensors as one CUDA graph, for the shapes that it is first called with.

    The first calls run as they are, on a stream of their own. Then one is captured, which computes nothing,
    and every call from that one on is a replay: no call is lost, none is done twice.

    Args:
        function: takes and gives any nest of tensors; tensors that it reads or writes besides must stay
            where they are in memory.
        warm_up: how many calls run as they are.
        shared: what several graphs of which one runs at a time have in common.
    """

    def __init__(
        self, function: Callable[..., Any], warm_up: int = WARM_UP, shared: "Shared | None" = None
    ) -> None:
        self.function = function
        self.warm_up = warm_up
        self._shared = shared
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives: in memory that the next call writes again.

        Raises:
            ValueError: a tensor has another shape or dtype than in the first call.
        """
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._inputs:
            if self._shared is None:
                self._shared = Shared()
            self._inputs = [self._shared.input(place, tensor) for place, tensor in enumerate(tensors)]
            self._stream = self._shared.stream
        for static, given in zip(self._inputs, tensors, strict=True):
            if static.shape != given.shape or static.dtype != given.dtype:
                raise ValueError(
                    f"a CUDA graph was made for {list(static.shape)} {static.dtype}, "
                    f"got {list(given.shape)} {given.dtype}: use speed.cuda_graph none"
                )
            static.copy_(given)
        if self._graph is None:
            held = iter(self._inputs)
            own = [next(held) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs = tree_unflatten(own, structure)
            if self._calls < self.warm_up:
                self._calls += 1
                return self._run_beside(inputs)
            graph, shared = torch.cuda.CUDAGraph(), self._shared
            assert shared is not None, "made with the inputs"
            with torch.cuda.graph(
                graph, pool=shared.pool, stream=self._stream, capture_error_mode=_CAPTURE_MODE
            ):
                self._result = self.function(*inputs)
            self._graph = graph
        self._graph.replay()
        return self._result

    def _run_beside(self, inputs: Any) -> Any:
        assert self._stream is not None
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self.function(*inputs)
        here.wait_stream(self._stream)
        return result


class Shared:
    """A stream, a pool of memory and input buffers, of graphs of which one runs at a time."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[tuple[Any, ...], Tensor] = {}

    def input(self, place: int, like: Tensor) -> Tensor:
        """Where graphs read a tensor of this shape, as the argument of this number."""
        key = (place, like.shape, like.dtype)
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(like)
        return self._inputs[key]


class GraphedStep:
    """A whole training step as one graph, or as one for each of few shapes.

    The first call of a shape runs in ordinary memory, beside what the graphs so far hold: not in theirs,
    where a tensor that a step keeps for later steps would be written over by a replay. Where a new shape
    finds too little memory, all graphs are given up, with one warning, and steps go on without.

    Args:
        step: forward, backward and update on one micro-batch: images and masks to its loss and more. What it
            needs most memory for must come before it changes anything, because it is called again then.
        buckets: bring masks to few shapes first; those of mode `budget` have one already.
    """

    def __init__(self, step: Callable[[Tensor, Masks], tuple[Tensor, Step]], buckets: bool = False) -> None:
        def on_tensors(images: Tensor, masks: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, out = step(images, Masks(**masks))  # type: ignore[arg-type]
            return loss, vars(out)

        self._step, self._on_tensors, self._buckets = step, on_tensors, buckets
        self._by_shape: dict[Any, Graphed] = {}
        self._shared: Shared | None = None
        self._given_up = False

    def __call__(self, images: Tensor, masks: Masks) -> tuple[Tensor, Step]:
        """The loss, for good; hidden states and predictions until the next step.

        Raises:
            torch.OutOfMemoryError: a step does not fit, with no graph beside it.
        """
        result = None if self._given_up else self._graphed(images, masks)
        if result is None:
            return self._step(images, masks)
        loss, out = result
        loss = loss.clone()
        return loss, Step(**out | {"loss": loss})

    def _graphed(self, images: Tensor, masks: Masks) -> tuple[Tensor, dict[str, Any]] | None:
        """What the graph of this shape gives; None where there is no memory for it."""
        fields = vars(in_buckets(masks) if self._buckets else masks)
        shapes = [v.shape if isinstance(v, Tensor) else v for v in fields.values()]
        key = (images.shape, *shapes)
        if key not in self._by_shape:
            self._shared = self._shared or Shared()
            # Kernels and workspaces are there after the first; one call more, for what goes by shape.
            warm_up = 1 if self._by_shape else WARM_UP
            self._by_shape[key] = Graphed(self._on_tensors, warm_up, self._shared)
        try:
            result: tuple[Tensor, dict[str, Any]] = self._by_shape[key](images, fields)
            return result
        except torch.OutOfMemoryError as error:
            others = len(self._by_shape) - 1
            if others == 0:  # no graph is in the way
                raise
            why = str(error).split(". ", 1)[0]
        # Out here, where the error no longer holds the tensors of the step.
        self._give_up()
        warnings.warn(
            f"no memory for a CUDA graph of one more shape beside {others} ({why}): from now on steps run "
            "without; speed.cuda_graph none is that from the start, masks.mode budget has one shape alone",
            stacklevel=3,
        )
        return None

    def _give_up(self) -> None:
        """Return the memory of all graphs, once none of them runs."""
        self._given_up = True
        torch.cuda.synchronize()
        self._by_shape.clear()
        self._shared = None
        torch.cuda.empty_cache()


class _Bare(nn.Module):
    """A module called with tensors alone, whose own `forward` may then be replaced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: Tensor) -> Any:
        return self.inner(*tensors)


def graph_parts(model: JEPA, images: Tensor, masks: Masks) -> None:
    """Make graphs of the student's encoder, its predictor and the target encoder, in place.

    Forward and backward passes of encoder and predictor are graphs of their own, so what an engine does with
    each gradient between them stays as it was. Nothing is learned by the warm-up. Called with other shapes or
    without gradient, as for judging, the modules run as before.

    Args:
        model: on the device, in the engine's hands.
        images: uint8 [B, C, H, W] on the device, a batch as all to come will be.
        masks: of mode `budget`.
    """
    hidden_of = model.target_hidden
    width = model.encoder.shape.width
    dtype = model.encoder.norm.weight.dtype
    context = torch.randn((*masks.context.shape, width), dtype=dtype, device=images.device)
    arguments: dict[nn.Module, tuple[Tensor, ...]] = {
        model.encoder: (images.clone(), masks.context.clone()),
        model.predictor: (context.requires_grad_(), masks.context.clone(), masks.targets.clone()),
    }
    bare = tuple(map(_Bare, arguments))
    # Captured in the order that they run in, and backward in the reverse: they share memory.
    _make_graphed(bare, tuple(arguments.values()))
    for (module, sample), graphed in zip(arguments.items(), bare, strict=True):
        _replace_forward(module, graphed, sample)
    target = Graphed(lambda pixels, fields: hidden_of(pixels, Masks(**fields)))
    setattr(model, "target_hidden", lambda pixels, masks: target(pixels, vars(masks)))  # noqa: B010


def _make_graphed(modules: tuple[nn.Module, ...], arguments: tuple[tuple[Tensor, ...], ...]) -> None:
    make = torch.cuda.make_graphed_callables
    if "capture_error_mode" in inspect.signature(make).parameters:
        make(modules, arguments, capture_error_mode=_CAPTURE_MODE)
        return
    capture = torch.cuda.graph  # torch 2.11 gives no say in it
    setattr(torch.cuda, "graph", partial(capture, capture_error_mode=_CAPTURE_MODE))  # noqa: B010
    try:
        make(modules, arguments)
    finally:
        setattr(torch.cuda, "graph", capture)  # noqa: B010


def _replace_forward(module: nn.Module, graphed: nn.Module, sample: tuple[Tensor, ...]) -> None:
    original = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        given = list(arguments)
        while given and given[-1] is None:  # cu_seqlens
            given.pop()
        fits = len(given) == len(sample) and all(
            isinstance(tensor, Tensor) and tensor.shape == like.shape and tensor.dtype == like.dtype
            for tensor, like in zip(given, sample, strict=True)
        )
        as_captured = all(value is None for value in keywords.values())
        if fits and as_captured and torch.is_grad_enabled() and module.training:
            return graphed(*given)
        return original(*arguments, **keywords)

    module.forward = forward
