"""EMA: the average of a model's weights, as a module: the teacher of a student.

One `ema_update_` over all parameters takes the place of a loop over them.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastjepa_kernels.checks import FLOAT_DTYPES, require, require_float, shape_of
from fastjepa_kernels.ema import ema_update_

_AVERAGES = (torch.float32, torch.float64)  # a parameter of these dtypes is its own average


def _unwrapped(model: nn.Module, wanted: type[nn.Module] | None = None) -> nn.Module:
    """The model inside of torch.compile's and data parallelism's wrappers; others' too down to `wanted`."""
    while type(model) is not wanted:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and (wanted or isinstance(model, DataParallel | DistributedDataParallel)):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _plain_name(name: str) -> str:
    # torch.compile of a part of a model puts itself into the middle of names.
    return name.replace("_orig_mod.", "")


def _named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What is averaged, what is copied, and non-persistent buffers: each once, by the first of its names."""
    averaged: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}
    caches: dict[str, Tensor] = {}
    non_persistent = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        (caches if name in non_persistent else copied)[_plain_name(name)] = buffer
    for name, parameter in model.named_parameters():
        whole_numbers = not (parameter.is_floating_point() or parameter.is_complex())
        (copied if whole_numbers else averaged)[_plain_name(name)] = parameter
    return averaged, copied, caches


def _check_alike(what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or unknown:
        differences = [f"it has no {name}" for name in sorted(missing)]
        differences += [f"it has {name} besides" for name in sorted(unknown)]
        raise ValueError(f"model must have the {what} that the average was made of: {'; '.join(differences)}")
    for name, tensor in own.items():
        other = given[name]
        if tensor.shape != other.shape or tensor.device != other.device:
            raise ValueError(
                f"{name} of model must be of the shape and on the device of its average, got "
                f"{shape_of(other)} and {shape_of(tensor)}"
            )


def _shadows_by_key(shadow: Mapping[str, Tensor], model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """As a state dict names them: a parameter under all of its names."""
    first = {id(parameter): _plain_name(name) for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {prefix + name: shadow[first[id(p)]] for name, p in named if first[id(p)] in shadow}


def _put_averages(
    shadow: Mapping[str, Tensor], model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    state_dict.update(_shadows_by_key(shadow, model, prefix))


@torch.no_grad()
def _take_averages(
    shadow: Mapping[str, Tensor],
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    *_errors: Any,
) -> None:
    require(
        not metadata.get("assign_to_params_buffers"),
        "load_state_dict of an average must not assign: that would change its dtypes and take the loaded "
        "tensors' memory. From the meta device, call to_empty first. (torch leaves a mark in a state dict "
        "that was loaded with assign=True; dict(state_dict) has none.)",
    )
    # Anything missing or of another shape is reported by what loads the parameters.
    for key, average in _shadows_by_key(shadow, model, prefix).items():
        if key in state_dict and state_dict[key].shape == average.shape:
            average.copy_(state_dict[key])


class EMA(nn.Module):
    """The exponential moving average of a model's weights.

        teacher = EMA(student, 0.996)
        for images in loader:
            loss = distance(student(images), teacher(images))
            loss.backward()
            optimizer.step()
            teacher.update(student)

    The average is kept in fp32 (in fp64 for parameters in fp64), whatever the model computes in: an average
    in bf16 stalls. Where the two differ the averages lie beside the model, and its working copy is written in
    the same pass. A state dict holds the averages, under the names that the model's parameters have. Buffers
    are copied, those of whole numbers as well: the running statistics of BatchNorm are averages already.
    Parameters with several names are averaged once.

    Args:
        model: what to average, as it is or wrapped by torch.compile, DataParallel or
            DistributedDataParallel; a copy is made of what is inside. Sharded parameters cannot be averaged.
        momentum: in [0, 1], a float or a 0-d tensor on the device.
        working_dtype: what the copy computes in; by default that of each parameter.

    Attributes:
        model: the copy, in eval mode and without gradients. `train()` makes it a teacher with dropout.
        momentum: of each `update` without its own; moved along by `to`.

    Raises:
        ValueError: momentum is out of [0, 1], or working_dtype or a parameter is of no dtype to average in.
    """

    def __init__(
        self, model: nn.Module, momentum: float | Tensor, *, working_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require(
            isinstance(momentum, Tensor) or 0 <= momentum <= 1,
            lambda: f"momentum must lie in [0, 1], got {momentum}",
        )
        require(
            working_dtype is None or working_dtype in FLOAT_DTYPES,
            lambda: f"working_dtype must be floating point, got {working_dtype}",
        )
        self.momentum = momentum
        self.model = copy.deepcopy(_unwrapped(model)).eval().requires_grad_(False)
        self._shadow: dict[str, Tensor] = {}  # averages that are not the parameter itself; filled in place
        for parameter in self.model.parameters():
            parameter.grad = None
        averages = self._averages()
        for name, average in averages.items():
            require_float(name, average)
        if working_dtype is not None:
            self.model.to(working_dtype)
        self._keep(averages)
        # Of the model's, so that its own state dict too is that of the averages.
        self.model.register_state_dict_post_hook(partial(_put_averages, self._shadow))
        self.model.register_load_state_dict_pre_hook(partial(_take_averages, self._shadow))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | Tensor | None = None) -> None:
        """Move the average towards the weights of `model`, and copy its buffers.

        Args:
            model: with the parameters and buffers that the average was made of, wrapped or not.
            momentum: instead of `self.momentum`.

        Raises:
            ValueError: a parameter or buffer is missing, was added, has another shape or is elsewhere,
                momentum is out of [0, 1], or `self.model` was cast or moved by itself; nothing is written
                then. Non-persistent buffers may differ, such as caches that a forward pass fills: those of
                one shape on both sides are copied.
        """
        model = _unwrapped(model, type(self.model))
        own, own_buffers, own_caches = _named_tensors(self.model)
        given, given_buffers, given_caches = _named_tensors(model)
        self._check_averages(own)
        _check_alike("parameters", own, given)
        _check_alike("buffers", own_buffers, given_buffers)
        for name, cache in own_caches.items():
            if name in given_caches and given_caches[name].shape == cache.shape:
                own_buffers[name], given_buffers[name] = cache, given_caches[name]
        momentum = self.momentum if momentum is None else momentum
        beside = list(self._shadow)
        itself = [name for name in own if name not in self._shadow]
        for averages, names, working in (
            (self._shadow, beside, [own[name] for name in beside]),
            (own, itself, None),
        ):
            ema_update_(
                [averages[name] for name in names], [given[name] for name in names], momentum, working
            )
        if own_buffers:
            torch._foreach_copy_(list(own_buffers.values()), [given_buffers[name] for name in own_buffers])

    def _check_averages(self, own: Mapping[str, Tensor]) -> None:
        for name, parameter in own.items():
            average = self._shadow.get(name, parameter)
            if average.dtype not in _AVERAGES or average.device != parameter.device:
                raise ValueError(
                    f"{name} cannot be averaged in {shape_of(average)} beside {shape_of(parameter)}: cast "
                    "and move an average by EMA.to, not by the model in it"
                )

    def _averages(self) -> dict[str, Tensor]:
        """As they are now: what becomes of the parameters does not change them."""
        return {name: p.detach() for name, p in _named_tensors(self.model)[0].items()} | self._shadow

    @torch.no_grad()
    def _keep(self, averages: Mapping[str, Tensor]) -> None:
        """Take these values, beside the parameters whose dtype could not hold them."""
        for name, parameter in _named_tensors(self.model)[0].items():
            average = averages[name]
            if parameter.dtype in _AVERAGES:
                if self._shadow.pop(name, None) is not None:
                    parameter.copy_(average)
                continue
            dtype = torch.float64 if average.dtype == torch.float64 else torch.float32
            if average.is_meta:  # it has no values to move
                self._shadow[name] = torch.empty_like(parameter, dtype=dtype)
            else:
                self._shadow[name] = average.to(parameter.device, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What moves or casts this module comes by here, but not what does so to the model alone: `update`
        # refuses that. A cast is of the working copy, never of the average.
        averages = self._averages()
        super()._apply(fn, recurse)
        self._keep(averages)
        parameter = next(self.model.parameters(), None)
        if isinstance(self.momentum, Tensor) and parameter is not None and not parameter.is_meta:
            self.momentum = self.momentum.to(parameter.device)
        return self
