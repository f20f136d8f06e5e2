"""The state of learning and its one step: student, optimizer and target encoder under DeepSpeed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from fastjepa.config import Config
from fastjepa.data.loader import Batch
from fastjepa.engine.launch import World, start_engine
from fastjepa.engine.partitions import (
    MOMENTS,
    Partition,
    gather,
    load_moments,
    load_weights,
    moments_of,
    partitions_of,
)
from fastjepa.engine.schedules import Rates
from fastjepa.engine.target import ENCODER, ShardedTarget, shard_target
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE, Step

Named = Mapping[str, Tensor]


@dataclass
class Learner:
    """Everything that a training step changes.

    Attributes:
        model: the objective, its weights shared with the engine.
        engine: DeepSpeed's, around the trainable part of the model.
        partitions: where the fp32 masters are.
        target: the target encoder's shadow; None for MAE.
        grad_norm: of the last step, before clipping.
        updates: optimizer steps that changed the weights; DeepSpeed skips those without finite gradients.
        skipped_in_a_row: steps since the last of them.
    """

    model: JEPA | MAE
    engine: DeepSpeedEngine
    partitions: list[Partition]
    target: ShardedTarget | None
    grad_norm: Tensor | float = 0.0
    updates: int = 0
    skipped_in_a_row: int = 0

    def step(self, micro_batches: Iterable[Batch], rates: Rates) -> tuple[Tensor, Step]:
        """One optimizer step over `speed.accumulation` micro-batches: its loss, and what the last gave."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates.lr
            group["weight_decay"] = rates.weight_decay if group["decayed"] else 0.0
        losses: list[Tensor] = []
        for batch in micro_batches:
            out = self.model.step(self.engine, batch.images, batch.masks)
            self.engine.backward(out.loss)
            self._note_gradients()
            self.engine.step()
            losses.append(out.loss.detach())
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            self.grad_norm = norm
        if self.engine.was_step_applied():
            self.updates, self.skipped_in_a_row = self.updates + 1, 0
            if self.target is not None:
                self.target.update(rates.momentum)
        else:  # then the target must stand still too
            self.skipped_in_a_row += 1
        return torch.stack(losses).mean(), out

    def _note_gradients(self) -> None:
        """Stage 0 in fp32 is a plain optimizer: DeepSpeed takes no norm of its gradients."""
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)

    @property
    def judged_encoder(self) -> VisionTransformer:
        """What evaluation looks at: the target encoder for JEPA, as published; the encoder for MAE."""
        return self.model.target_encoder if isinstance(self.model, JEPA) else self.model.encoder

    def is_finite(self) -> Tensor:
        """0-d bool on the device: whether this rank's master weights are all finite."""
        return torch.stack([torch.isfinite(p.master).all() for p in self.partitions]).all()

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """Weights, moments and shadow by name, on rank 0 (every rank must call this)."""
        state = {"student": gather(self.partitions, [p.master for p in self.partitions])}
        for moment in MOMENTS:
            state[moment] = gather(self.partitions, moments_of(self.engine, self.partitions, moment))
        if self.target is not None:
            state["target"] = self.target.gather_shadow()
        return state

    def load(self, student: Named, target: Named | None, moments: Mapping[str, Named], updates: int) -> None:
        """Set everything from named fp32 tensors; `updates` is the optimizer's count, 0 for a fresh one."""
        load_weights(self.engine, self.partitions, student)
        load_moments(self.engine, self.partitions, moments, updates)
        self.updates = updates
        if self.target is not None:
            assert target is not None, "a JEPA learner needs the weights of its target encoder"
            self.target.load(target)


def start_learner(model: JEPA | MAE, config: Config, world: World) -> Learner:
    """Put `model` under DeepSpeed, with the weights it has, in full fp32, as masters."""
    network = model.trainable()
    student = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    engine = start_engine(network, config, world)
    partitions = partitions_of(engine)
    target, target_weights = None, None
    if isinstance(model, JEPA):
        target_weights = {
            ENCODER + name: parameter.clone() for name, parameter in model.target_encoder.named_parameters()
        }
        dtype = torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
        target = shard_target(model.target_encoder, partitions, dtype)
    learner = Learner(model, engine, partitions, target)
    # DeepSpeed's masters came by way of the network's precision; these have all their bits.
    learner.load(student, target_weights, {}, updates=0)
    return learner
