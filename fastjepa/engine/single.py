"""Training on one device without DeepSpeed: flat buffers, one update in one launch a group, no host sync.

    gradients of the parameters -> one flat buffer                     a few launches
    norm, clipping, finite or not, count of steps                      on the device, read by no one
    AdamW, cast to the weights, the target's average and its cast      fk.adamw_ema_, one launch a group

The host learns late whether a step was skipped: from a copy in pinned memory that it reads `LAG` steps
later, when it has long been there.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.engine.memory import keep_freed_memory
from fastjepa.engine.schedules import Rates
from fastjepa_kernels.adamw import HYPER, MOMENTUM, SCALE, SKIP, STEP

ALIGNED = 64  # elements: 128 bytes of bf16, a cache line and more than any vector load
LAG = 1  # steps of which the host has not yet heard, on a GPU
_CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its flat group."""

    parameter: nn.Parameter
    offset: int  # of its first element

    def view(self, flat: Tensor) -> Tensor:
        """Its part of a flat tensor, in its shape."""
        return flat[self.offset : self.offset + self.parameter.numel()].view(self.parameter.shape)


@dataclass(eq=False)
class FlatGroup:
    """Parameters with the same decay, one after another; what lies between them is and stays 0.

    Attributes:
        slots: the parameters, each from a multiple of `ALIGNED` elements on.
        decayed: whether weight decay is for them.
        master, exp_avg, exp_avg_sq: fp32 [n].
        weight: [n], what the network computes with, and the parameters are views of; in fp32 the master.
        grad: [n] of the whole step: fp32 where micro-batches are summed, else as the weights.
        shadow, working: of the target encoder that follows in the same launch, if one does; working is None
            where it is the shadow.
    """

    slots: list[Slot]
    decayed: bool
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor
    grad: Tensor
    shadow: Tensor | None = None
    working: Tensor | None = None


class Told(NamedTuple):
    """What the host knows of the steps, possibly late."""

    updates: int
    skipped_in_a_row: int


class SingleDevice:
    """AdamW on one device, in place of a DeepSpeed engine at stage 0, with all its decisions on the device.

    A step whose gradients are not finite changes nothing but the count of skipped steps.

    Args:
        network: on its device; its parameters become views of the flat buffers.
        groups: from `parameter_groups`.
        dtype: that the network computes in.
        betas, eps: of AdamW.
        clip: largest norm of the gradients; 0 for none.
        accumulation: micro-batches per step, whose gradients are averaged, in fp32.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: list[dict[str, Any]],
        *,
        dtype: torch.dtype,
        betas: tuple[float, float],
        eps: float,
        clip: float = 0.0,
        accumulation: int = 1,
    ) -> None:
        self.module = network
        self.betas, self.eps, self.clip, self.accumulation = betas, eps, clip, accumulation
        laid_out = [_lay_out(group["params"]) for group in groups]
        device = groups[0]["params"][0].device
        if device.type == "cpu":
            keep_freed_memory()
        sizes = [n for _, n in laid_out]
        network.to(dtype)  # its buffers too, as DeepSpeed does
        # All groups in one piece of memory, so that one reduction gives the norm of all gradients.
        self._fresh = torch.zeros(sum(sizes), dtype=dtype, device=device)  # of the last micro-batch
        self._sum = (
            self._fresh if accumulation == 1 else self._fresh.new_zeros(sum(sizes), dtype=torch.float32)
        )
        self.groups = [
            _flat_group(slots, group["decayed"], grad)
            for (slots, _), group, grad in zip(laid_out, groups, self._sum.split(sizes), strict=True)
        ]
        fresh = zip(self.groups, self._fresh.split(sizes), strict=True)
        self._gradients = [(slot.parameter, slot.view(flat)) for group, flat in fresh for slot in group.slots]
        self.hyper = torch.zeros(len(HYPER), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), dtype=torch.float64, device=device)
        self._micro_batches = 0  # of this step so far
        self._late = _Late(device)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def follow(self, shadow: list[Tensor], working: list[Tensor]) -> None:
        """From now on, let averages follow the first groups, in the launch that updates them.

        Args:
            shadow: fp32 [n] of each of these groups.
            working: [n] of each, a copy of it in the precision that it is computed with, or itself.
        """
        for group, average, copy in zip(self.groups[: len(shadow)], shadow, working, strict=True):
            group.shadow, group.working = average, None if copy is average else copy

    # A step

    def set_rates(self, rates: Rates) -> None:
        """Send the rates of the next step to the device, without a wait."""
        values = torch.tensor([rates.lr, rates.weight_decay, rates.momentum], dtype=torch.float64)
        if self.hyper.is_cuda:
            # Pinned memory comes from torch's cache, which gives none out again before its copies are done.
            values = values.pin_memory()
        self.hyper[: len(values)].copy_(values, non_blocking=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch to those of the step."""
        for parameter, _ in self._gradients:
            parameter.grad = None  # then autograd hands over its own tensor, and adds to none
        loss.backward()
        pairs = [(flat, parameter.grad) for parameter, flat in self._gradients]
        gradients = [(flat, gradient) for flat, gradient in pairs if gradient is not None]
        torch._foreach_copy_([flat for flat, _ in gradients], [gradient for _, gradient in gradients])
        if len(gradients) < len(pairs):
            torch._foreach_zero_([flat for flat, gradient in pairs if gradient is None])
        for parameter, _ in self._gradients:
            parameter.grad = None
        if self._sum is not self._fresh:
            if self._micro_batches == 0:
                self._sum.copy_(self._fresh)
            else:
                self._sum.add_(self._fresh)
        self._micro_batches += 1

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights, and the target encoder where it follows here."""
        assert self._micro_batches == self.accumulation, "a step is over all its micro-batches"
        self._micro_batches = 0
        self._decide()
        for group in self.groups:
            fk.adamw_ema_(
                group.master,
                group.grad,
                group.exp_avg,
                group.exp_avg_sq,
                self.hyper,
                weight=None if group.weight is group.master else group.weight,
                shadow=group.shadow,
                working=group.working,
                betas=self.betas,
                eps=self.eps,
                decayed=group.decayed,
            )

    def _decide(self) -> None:
        """What all groups need of all gradients: the norm, whether to skip, the count, the scale."""
        norm = torch.linalg.vector_norm(self._sum, dtype=torch.float32) / self.accumulation
        self.grad_norm.copy_(norm)
        skip = norm.isfinite().logical_not()
        self.hyper[SKIP].copy_(skip)
        self.hyper[STEP].add_(skip.logical_not())
        self._in_a_row.add_(1).mul_(skip)
        if self.clip:
            self.hyper[SCALE].copy_((self.clip / (norm + _CLIP_EPS)).clamp_(max=1) / self.accumulation)
        else:
            self.hyper[SCALE].fill_(1 / self.accumulation)

    @property
    def momentum(self) -> Tensor:
        """0-d: what the target encoder follows with after this step, where it follows apart; 1 if skipped."""
        return torch.where(self.hyper[SKIP] != 0, 1.0, self.hyper[MOMENTUM])

    # What became of it

    def get_global_grad_norm(self) -> Tensor:
        """0-d on the device: of the last step, before clipping."""
        return self.grad_norm

    def note(self) -> None:
        """Send word of this step to the host, and hear of the step `lag` before it."""
        self._late.send(torch.stack([self.hyper[STEP], self._in_a_row]))

    def hear(self) -> bool:
        """Wait until the host knows of every step; False if it did."""
        return self._late.hear()

    @property
    def lag(self) -> int:
        """Steps of which the host has not yet heard."""
        return self._late.lag

    @property
    def told(self) -> Told:
        """As of `lag` steps ago."""
        return self._late.told

    def count_updates(self) -> int:
        """Steps that changed the weights, exactly: this waits for the device."""
        return int(self.hyper[STEP].item())

    def set_updates(self, updates: int) -> None:
        """Begin after this many."""
        self.hyper[STEP].fill_(updates)
        self._in_a_row.zero_()
        self._late.forget(Told(updates, 0))


def _lay_out(parameters: list[nn.Parameter]) -> tuple[list[Slot], int]:
    """Where each goes in a flat group, and the elements of the group."""
    slots, end = [], 0
    for parameter in parameters:
        slots.append(Slot(parameter, end))
        end += -(-parameter.numel() // ALIGNED) * ALIGNED
    return slots, end


def _flat_group(slots: list[Slot], decayed: bool, grad: Tensor) -> FlatGroup:
    first = slots[0].parameter
    master = torch.zeros(grad.numel(), device=grad.device)
    weight = master if first.dtype == torch.float32 else torch.zeros_like(master, dtype=first.dtype)
    for slot in slots:
        slot.view(master).copy_(slot.parameter.detach())
        slot.view(weight).copy_(slot.parameter.detach())
        slot.parameter.data = slot.view(weight)
    return FlatGroup(slots, decayed, master, torch.zeros_like(master), torch.zeros_like(master), weight, grad)


class _Late:
    """What the device says, heard without a wait: as of `lag` steps ago."""

    def __init__(self, device: torch.device) -> None:
        self.lag = LAG if device.type == "cuda" else 0
        self.told = Told(0, 0)
        self._sent: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def send(self, status: Tensor) -> None:
        """`status` [2] on the device: updates, skipped in a row."""
        if status.is_cuda:
            here = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
            here.copy_(status, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._sent.append((here, event.synchronize))
        else:
            self._sent.append((status, lambda: None))
        if len(self._sent) > self.lag:
            # Of a step that the device has finished, unless the host is that far ahead of it; the steps
            # issued since keep it busy.
            self._hear_next()

    def hear(self) -> bool:
        """All that was sent; False if nothing was left."""
        is_news = bool(self._sent)
        while self._sent:
            self._hear_next()
        return is_news

    def _hear_next(self) -> None:
        there, arrive = self._sent.popleft()
        arrive()
        self.told = Told(*map(int, there.tolist()))

    def forget(self, told: Told) -> None:
        """Begin anew with this."""
        self._sent.clear()
        self.told = told
