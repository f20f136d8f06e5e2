"""The state of learning and its one step: student, optimizer and target encoder, under DeepSpeed or alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.data.loader import Batch
from fastjepa.engine.graphs import GraphedStep, graph_parts
from fastjepa.engine.launch import start_engine, zero_stage
from fastjepa.engine.partitions import (
    MOMENTS,
    Partition,
    Parts,
    gather,
    load_moments,
    load_weights,
    moments_of,
    partitions_of,
)
from fastjepa.engine.processes.world import World
from fastjepa.engine.protocol import Engine, ZeroEngine
from fastjepa.engine.schedules import Rates
from fastjepa.engine.single import SingleDevice, Told
from fastjepa.engine.speed import apply_speed, check_speed, cuda_graph_of
from fastjepa.engine.target import ENCODER, ShardedTarget, shard_target
from fastjepa.masks import Masks
from fastjepa.models import MAEDecoder, Predictor, VisionTransformer
from fastjepa.objectives import JEPA, MAE, Step

Named = Mapping[str, Tensor]


@dataclass
class Learner:
    """Everything that a training step changes.

    Attributes:
        model: the objective, its weights shared with the engine.
        engine: around the trainable part of the model: DeepSpeed's, or a `SingleDevice`.
        partitions: where the fp32 masters are.
        target: the target encoder's shadow; None for MAE.
        follows_apart: the target encoder is moved after the update, not in the same launch.
        cuda_graph: what is captured, if anything.
        buckets: masks are brought to few shapes, of which each is captured.
        grad_norm: of the last step, before clipping.
    """

    model: JEPA | MAE
    engine: Engine
    partitions: list[Partition]
    target: ShardedTarget | None
    follows_apart: bool = True
    cuda_graph: Literal["none", "parts", "step"] = "none"
    buckets: bool = False
    grad_norm: Tensor | float = 0.0
    _told: Told = field(default_factory=lambda: Told(0, 0))  # under DeepSpeed, which tells at once
    _graphed_step: GraphedStep | None = field(default=None, repr=False)

    @property
    def updates(self) -> int:
        """Optimizer steps that changed the weights; those without finite gradients are skipped.

        Exact. Where the device keeps the count, this waits for it.
        """
        return self.engine.count_updates() if isinstance(self.engine, SingleDevice) else self._told.updates

    @property
    def skipped_in_a_row(self) -> int:
        """Steps since the last update, as of `lag` steps ago."""
        told = self.engine.told if isinstance(self.engine, SingleDevice) else self._told
        return told.skipped_in_a_row

    @property
    def lag(self) -> int:
        """Steps whose outcome the host does not know yet."""
        return self.engine.lag if isinstance(self.engine, SingleDevice) else 0

    def hear(self) -> bool:
        """Wait for the outcome of the last step; False if it was known."""
        return isinstance(self.engine, SingleDevice) and self.engine.hear()

    def step(self, micro_batches: Iterable[Batch], rates: Rates) -> tuple[Tensor, Step]:
        """One optimizer step over `speed.accumulation` micro-batches: its loss, and what the last gave.

        With a CUDA graph, hidden states and predictions are good until the next step.
        """
        if isinstance(self.engine, SingleDevice):
            return self._step_alone(self.engine, list(micro_batches), rates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates.lr
            group["weight_decay"] = rates.weight_decay if group["decayed"] else 0.0
        losses: list[Tensor] = []
        skip = None
        for batch in micro_batches:
            self._graph_parts_once(batch.images, batch.masks)
            out = self.model.step(self.engine, batch.images, batch.masks)
            self.engine.backward(out.loss)
            skip = self._decide_alone(self.engine)
            self.engine.step()
            losses.append(out.loss.detach())
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            self.grad_norm = norm
        if self.engine.was_step_applied() and not skip:
            self._told = Told(self._told.updates + 1, 0)
            if self.target is not None:
                self.target.update(rates.momentum)
                self._refresh_fp8()
        else:  # then the target must stand still too
            _forget_sums(self.engine)
            self._told = Told(self._told.updates, self._told.skipped_in_a_row + 1)
        return torch.stack(losses).mean(), out

    def _step_alone(
        self, engine: SingleDevice, micro_batches: list[Batch], rates: Rates
    ) -> tuple[Tensor, Step]:
        """Without a wait for the device: nothing here asks what it has computed."""
        engine.set_rates(rates)
        if self.cuda_graph == "step":
            if self._graphed_step is None:
                self._graphed_step = GraphedStep(
                    lambda images, masks: self._on_device(engine, [(images, masks)]), self.buckets
                )
            (batch,) = micro_batches
            result = self._graphed_step(batch.images, batch.masks)
        else:
            self._graph_parts_once(micro_batches[0].images, micro_batches[0].masks)
            result = self._on_device(engine, [(batch.images, batch.masks) for batch in micro_batches])
        engine.note()
        self.grad_norm = engine.get_global_grad_norm()
        return result

    def _on_device(
        self, engine: SingleDevice, micro_batches: list[tuple[Tensor, Masks]]
    ) -> tuple[Tensor, Step]:
        """All that the device does in a step: what a graph can hold."""
        losses: list[Tensor] = []
        for images, masks in micro_batches:
            out = self.model.step(engine, images, masks)
            engine.backward(out.loss)
            losses.append(out.loss.detach())
        engine.step()
        if self.target is not None and self.follows_apart:
            self.target.update(engine.momentum)
        self._refresh_fp8()
        return torch.stack(losses).mean(), replace(out, loss=losses[-1])

    def _graph_parts_once(self, images: Tensor, masks: Masks) -> None:
        if self.cuda_graph == "parts":
            assert isinstance(self.model, JEPA)
            graph_parts(self.model, images, masks)
            self.cuda_graph = "none"  # the modules are graphs from now on

    def _refresh_fp8(self) -> None:
        """After the target encoder has changed."""
        if isinstance(self.model, JEPA) and self.model.fp8 is not None:
            self.model.fp8.refresh()

    def _decide_alone(self, engine: ZeroEngine) -> Tensor | None:
        """Where DeepSpeed takes no norm of the gradients, take it; if it is no number, have the step skipped.

        Stage 0 in fp32 is a plain optimizer. Its gradients are averages over the ranks, so that all decide
        the same, and it is told as torch's gradient scaler tells it.

        Returns:
            0-d on the device: whether it is skipped; None where DeepSpeed sees to it.
        """
        optimizer = engine.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            return None
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        skip = self.grad_norm.isfinite().logical_not()
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        return skip

    def encoders(self) -> "Encoders":
        """What can be judged, whole on rank 0 (every rank must call this).

        At ZeRO 3 they are copies there, and the other ranks have none.
        """
        model = self.model
        target = model.target_encoder if isinstance(model, JEPA) else None
        head = model.predictor if isinstance(model, JEPA) else model.decoder
        if all(partition.layout is not None for partition in self.partitions):
            return Encoders(model.encoder, target, head)
        whole = gather(self.partitions, [partition.master for partition in self.partitions])
        context, head = _whole_copy(model.encoder, whole), _whole_head(model, whole)
        if self.target is None:
            return Encoders(context, None, head)
        return Encoders(context, _whole_copy(model.encoder, self.target.gather_shadow()), head)

    def is_finite(self) -> Tensor:
        """0-d bool on the device: whether this rank's master weights are all finite.

        By the smallest and the largest: `isfinite` would take 7 bytes for each element for a moment.
        """
        masters = [partition.master for partition in self.partitions if partition.master.numel()]
        ends = [end for master in masters for end in torch.aminmax(master)]  # nan, if one element is
        if not ends:
            return torch.ones((), dtype=torch.bool)
        return torch.stack(ends).isfinite().all()

    def parts(self) -> dict[str, Parts]:
        """Weights, moments and shadow as this rank has them, by the name of their file in a checkpoint."""
        state = {"student": Parts(self.partitions, [p.master for p in self.partitions])}
        for moment in MOMENTS:
            state[moment] = Parts(self.partitions, moments_of(self.engine, self.partitions, moment))
        if self.target is not None:
            state["target"] = Parts(self.target.partitions, self.target.shadow)
        return state

    def shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Of the tensors of `parts` when whole, by file and name."""
        named = {
            name: torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 empties parameters
            for name, parameter in self.engine.module.named_parameters()
        }
        return {
            file: {name: named[name] for partition in parts.partitions for name in partition.names}
            for file, parts in self.parts().items()
        }

    @property
    def zero_stage(self) -> int:
        """0 without DeepSpeed too."""
        return 0 if isinstance(self.engine, SingleDevice) else self.engine.zero_optimization_stage()

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """All of `parts`, whole and by name, on the host of rank 0 (every rank must call this)."""
        return {kind: gather(parts.partitions, parts.tensors) for kind, parts in self.parts().items()}

    def load(self, student: Named, target: Named | None, moments: Mapping[str, Named], updates: int) -> None:
        """Set everything from named fp32 tensors; `updates` is the optimizer's count, 0 for a fresh one."""
        load_weights(self.engine, self.partitions, student)
        load_moments(self.engine, self.partitions, moments, updates)
        self._told = Told(updates, 0)
        if self.target is not None:
            assert target is not None, "a JEPA learner needs the weights of its target encoder"
            self.target.load(target)
            self._refresh_fp8()


def _forget_sums(engine: ZeroEngine) -> None:
    """Let go of the gradients of a step that was skipped.

    DeepSpeed 0.19.8 does so itself but with offload in bf16, where it would add those of all later steps to
    sums that are not finite, and skip for ever.
    """
    sums: dict[int, Any] = getattr(engine.optimizer, "averaged_gradients", {})
    for group in sums:
        sums[group] = None


@dataclass(frozen=True)
class Encoders:
    """Those of a learner: the context encoder, or that of MAE, and the target encoder of JEPA.

    Where rank 0 has the only whole copies, none is there on the other ranks, which do not judge.

    Attributes:
        target: None for MAE.
        head: what speaks of the hidden patches: JEPA's predictor, MAE's decoder.
    """

    _context: VisionTransformer | None
    target: VisionTransformer | None
    head: Predictor | MAEDecoder | None = None

    @property
    def context(self) -> VisionTransformer:
        assert self._context is not None, "rank 0 alone has whole encoders"
        return self._context

    @property
    def judged(self) -> VisionTransformer:
        """What evaluation looks at: the target encoder for JEPA, as published; the encoder for MAE."""
        return self.context if self.target is None else self.target


def _whole_copy(encoder: VisionTransformer, weights: Named) -> VisionTransformer | None:
    """An encoder of the same shape, place and precision, with weights named as in the student.

    None where none were gathered: on all ranks but 0.
    """
    if not weights:
        return None
    copy = VisionTransformer(encoder.shape, encoder.pixel_mean, encoder.pixel_std)
    copy.load_state_dict(_below(ENCODER, weights) | {"pos_embed": copy.pos_embed})
    return copy.to(encoder.pos_embed)


def _whole_head(model: JEPA | MAE, weights: Named) -> Predictor | MAEDecoder | None:
    """The predictor or decoder of a model, as `_whole_copy` has its encoder."""
    if not weights:
        return None
    if isinstance(model, JEPA):
        embed, blocks = model.predictor.predictor_embed, model.predictor.predictor_blocks
        sizes = embed.out_features, len(blocks), blocks.blocks()[0].attn.heads
        predictor = Predictor(model.encoder.shape.grid, embed.in_features, *sizes)
        predictor.load_state_dict(_below("predictor.", weights) | dict(predictor.named_buffers()))
        return predictor.to(model.predictor.predictor_pos_embed)
    if model.decoder is None:
        return None
    blocks = model.decoder.decoder_blocks
    sizes = model.decoder.decoder_embed.out_features, len(blocks), blocks.blocks()[0].attn.heads
    decoder = MAEDecoder(model.encoder.shape, *sizes)
    decoder.load_state_dict(_below("decoder.", weights) | dict(decoder.named_buffers()))
    return decoder.to(model.decoder.decoder_pos_embed)


def _below(prefix: str, weights: Named) -> dict[str, Tensor]:
    """The weights whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def how_it_runs(learner: Learner, config: Config, world: World) -> str:
    """One line for people, before the first step: what steps, what is captured, in which precision."""
    device = "the CPU" if world.device.type == "cpu" else "a GPU" if world.size == 1 else "GPUs"
    if isinstance(learner.engine, SingleDevice):
        engine = f"Runs alone, without DeepSpeed, on {device}"
    else:
        ranks = "one rank" if world.size == 1 else f"{world.size} ranks"
        engine = f"Runs under DeepSpeed, ZeRO stage {zero_stage(config)}, {ranks} on {device}"
    graph = {
        "none": "no CUDA graph",
        "parts": "CUDA graphs of the networks",
        "step": "a CUDA graph of the whole step" + " for each shape of masks" * learner.buckets,
    }[learner.cuda_graph]
    if not isinstance(learner.model, JEPA):
        return f"{engine}; {graph}"
    precision = config.optim.precision if learner.model.fp8 is None else "fp8"
    return f"{engine}; {graph}; the target encoder in {precision}"


def start_learner(model: JEPA | MAE, config: Config, world: World) -> Learner:
    """Put `model` into the hands of an engine, with the weights it has, in full fp32, as masters.

    Raises:
        ConfigError: `speed` asks for what these processes and devices cannot do.
    """
    check_speed(config, world)
    network = model.trainable()
    student = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    engine = start_engine(network, config, world)
    partitions = partitions_of(engine)
    target, target_weights, apart = None, None, True
    if isinstance(model, JEPA):
        target_weights = {
            ENCODER + name: parameter.clone() for name, parameter in model.target_encoder.named_parameters()
        }
        dtype = torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
        target = shard_target(model.target_encoder, partitions, dtype, world.device)
        if isinstance(engine, SingleDevice) and config.speed.fused_update:
            engine.follow(target.shadow, target.working)
            apart = False
    apply_speed(model, config, world.device)
    buckets = isinstance(model, JEPA) and config.masks.mode != "budget"
    learner = Learner(model, engine, partitions, target, apart, cuda_graph_of(config, world), buckets)
    # The masters came by way of the network's precision; these have all their bits.
    learner.load(student, target_weights, {}, updates=0)
    return learner
