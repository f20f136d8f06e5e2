"""CUDA graphs of a training step: the host launches one graph where it launched a thousand kernels.

A graph repeats the same kernels on the same memory. So shapes may not change (masks of mode `budget`), what
comes in is copied to where the graph reads it, and what comes out lies where the next replay will write.
Nothing of a step may come from the host: its rates and its counts are on the device.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastjepa.masks import Masks
from fastjepa.objectives import JEPA, Step

WARM_UP = 3  # calls before the capture: kernels are compiled, caches and workspaces filled
# Other threads (of the loader, of pinned memory) go on calling CUDA while a graph is captured.
_CAPTURE_MODE = "thread_local"


class Graphed:
    """A function of tensors as one CUDA graph, for the shapes that it is first called with.

    The first `WARM_UP` calls run as they are, on a stream of their own. Then one is captured, which computes
    nothing, and every call from that one on is a replay: no call is lost, none is done twice.

    Args:
        function: takes and gives any nest of tensors; tensors that it reads or writes besides must stay
            where they are in memory.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
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
            self._inputs = [torch.empty_like(tensor) for tensor in tensors]
            self._stream = torch.cuda.Stream()
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
            if self._calls < WARM_UP:
                self._calls += 1
                return self._run_beside(inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=_CAPTURE_MODE):
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


class GraphedStep:
    """A whole training step as one graph.

    Args:
        step: forward, backward and update on one micro-batch: images and masks to its loss and more.
    """

    def __init__(self, step: Callable[[Tensor, Masks], tuple[Tensor, Step]]) -> None:
        def on_tensors(images: Tensor, masks: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, out = step(images, Masks(**masks))  # type: ignore[arg-type]
            return loss, vars(out)

        self._graphed = Graphed(on_tensors)

    def __call__(self, images: Tensor, masks: Masks) -> tuple[Tensor, Step]:
        """The loss, for good; hidden states and predictions until the next step."""
        loss, out = self._graphed(images, vars(masks))
        loss = loss.clone()
        return loss, Step(**out | {"loss": loss})


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
        if fits and not keywords and torch.is_grad_enabled() and module.training:
            return graphed(*given)
        return original(*arguments, **keywords)

    module.forward = forward
