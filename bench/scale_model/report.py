"""Tables and files of the predictions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from bench.kernels.table import aligned
from bench.scale_model.predict import Base, Options, Prediction
from fastjepa.planning.memory import DEFAULT, STAGES

SMALL = 8  # images of a rank, under which nothing was measured that is like it


@dataclass(frozen=True)
class Scaling:
    """Predictions for one network.

    Attributes:
        base: what they stand on.
        kind: strong, for one global batch, or weak, for one batch of a GPU.
        batch: that one.
        device: where the host costs nothing, as with CUDA graphs.
        launched: where it launches every kernel.
        bucketed: as `device`, with gradients in buckets behind the backward pass at every stage.
    """

    base: Base
    kind: str
    batch: int
    device: Sequence[Prediction]
    launched: Sequence[Prediction]
    bucketed: Sequence[Prediction]


def find(predictions: Sequence[Prediction], stage: int, gpus: int) -> Prediction:
    return next(each for each in predictions if (each.stage, each.gpus) == (stage, gpus))


def gpu_counts(scaling: Scaling) -> list[int]:
    return sorted({each.gpus for each in scaling.device})


def steps_table(scaling: Scaling) -> str:
    """For each number of GPUs the step of each stage, and what it is made of at their default stage."""
    heads = ("GPUs", "batch of a GPU", *(f"ZeRO {stage}, ms" for stage in STAGES))
    heads += ("launched, ms", "images/s", "efficiency", "compute", "update", "sent", "seen", "host")
    lines: list[Sequence[str]] = [heads]
    for gpus in gpu_counts(scaling):
        at = {stage: find(scaling.device, stage, gpus) for stage in STAGES}
        launched, one = find(scaling.launched, DEFAULT, gpus), at[DEFAULT]
        parts = one.compute_s, one.update_s, one.sent_s, one.exposed_s, launched.host_s
        lines.append(
            (
                f"{gpus:,}",
                f"{one.batch}{' †' if one.batch < SMALL else ''}",
                *(_step(each) for each in at.values()),
                _ms(launched.step_s),
                f"{one.images_per_s:,.0f}",
                f"{one.efficiency:.0%}",
                *map(_ms, parts),
            )
        )
    return aligned(lines, names=set())


def memory_table(scaling: Scaling) -> str:
    """Peak of a rank in GB, and of it what lives from step to step."""
    lines: list[Sequence[str]] = [("GPUs", *(f"ZeRO {stage}: peak (state)" for stage in STAGES))]
    for gpus in gpu_counts(scaling):
        found = (find(scaling.device, stage, gpus) for stage in STAGES)
        lines.append((f"{gpus:,}", *(f"{e.peak_bytes / 1e9:.1f} ({e.state_bytes / 1e9:.1f})" for e in found)))
    return aligned(lines, names=set())


def seen_table(scaling: Scaling) -> str:
    """Milliseconds of messages that are seen, as DeepSpeed sends gradients and in buckets behind backward."""
    heads = [f"ZeRO {stage}: now → in buckets" for stage in STAGES]
    lines: list[Sequence[str]] = [("GPUs", *heads)]
    for gpus in gpu_counts(scaling):
        both = scaling.device, scaling.bucketed
        pairs = [[find(each, stage, gpus) for each in both] for stage in STAGES]
        lines.append((f"{gpus:,}", *(f"{_ms(now.exposed_s)} → {_ms(then.exposed_s)}" for now, then in pairs)))
    return aligned(lines, names=set())


def _step(prediction: Prediction) -> str:
    """With its micro-batches, if there are several; a dash where it fits in none."""
    if not prediction.fits:
        return "–"
    return _ms(prediction.step_s) + (f" ({prediction.accumulation}×)" if prediction.accumulation > 1 else "")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def memory_check(checks: Mapping[str, float]) -> str:
    """What is known of how far off the memory side is."""
    found = ", ".join(f"ViT-{title} {ratio:.2f}" for title, ratio in checks.items())
    return (
        "Memory: of the largest masks of 128 steps, in tensors' bytes. On a CPU, states, activations and "
        "peaks are within 5 % of what 1 and 2 real ranks hold at every stage "
        "(tests/planning/test_memory.py). "
        f"Over the peak measured on one GPU: {found}; there the allocator rounds, and CUDA graphs hold "
        "several shapes."
    )


def based_on(base: Base) -> str:
    measured = base.measured
    what = f"`{measured.row}`, {measured.batch} images in {_ms(measured.step_s)} ms"
    where = f"{measured.device}, `{measured.file}`"
    if base.is_own:
        return f"compute: measured, {what} ({where}), scaled by FLOPs to the mean of masks"
    return (
        f"compute: never measured; its FLOPs at the {measured.flop_per_s / 1e12:.0f} TFLOP/s "
        f"(MFU {measured.mfu:.0%}) of ViT {measured.size}, {what} ({where})"
    )


def assumptions(options: Options, launch_us: str) -> str:
    links = options.cluster
    return (
        f"Nothing here was run on more than one GPU. Assumed: {links.gpus_per_node} GPUs a node; "
        f"{links.node_bytes_per_s / 1e9:g} GB/s of a GPU in a node and "
        f"{links.network_bytes_per_s / 1e9:g} GB/s between nodes; {links.node_latency_s * 1e6:g} and "
        f"{links.network_latency_s * 1e6:g} µs a hop; {links.ring} rings at their full rate. A GPU "
        "computes images of any micro-batch as fast as in the batch that was measured, at ZeRO 3 too, whose "
        f"blocks are not fused. A host that launches every kernel takes {launch_us} µs for each, as it was "
        "measured to do for the published code. Hidden behind computation: at ZeRO 2 and 3 all buckets of "
        "gradients but the last, at ZeRO 3 all gathers of weights but the first block's, as far as there is "
        "computation. Seen: everything else."
    )


NOTES = (
    "Milliseconds of a step at each stage with CUDA graphs, whose host costs nothing; `launched` as the host "
    "launches every kernel, which is what several ranks do by default. From there on all columns are of "
    f"ZeRO {DEFAULT}, their default: images/s and efficiency with graphs, and the parts of the step. `sent`: "
    "seconds of the links, `seen`: those not hidden. Efficiency: useful FLOP/s of a GPU over those of one "
    "GPU alone at the measured batch; above 100 % where more images share one update. †: fewer than 8 images "
    "on a GPU, where kernels are too small for the rate that was measured. (k×): in k micro-batches, as the "
    "whole batch does not fit; –: does not fit."
)


def page(scalings: Sequence[Scaling], options: Options, launch_us: str, checks: Mapping[str, float]) -> str:
    lines = ["# Predicted: I-JEPA on 8 to 4,096 GPUs", "", assumptions(options, launch_us), "", NOTES, ""]
    lines += [memory_check(checks), ""]
    for kind, title in (("strong", "Strong scaling, global batch"), ("weak", "Weak scaling, batch of a GPU")):
        for scaling in (each for each in scalings if each.kind == kind):
            network = scaling.base.network
            lines += [f"## {title} {scaling.batch:,}: ViT-{network.title}", ""]
            lines += [f"{network.parameters / 1e6:.0f} M parameters; {based_on(scaling.base)}.", ""]
            lines += [steps_table(scaling), "", "Memory of a rank, GB:", "", memory_table(scaling), ""]
            if kind == "strong":
                lines += ["Messages that are seen, ms, now and if every stage reduced in buckets:", ""]
                lines += [seen_table(scaling), ""]
    return "\n".join(lines).rstrip() + "\n"


def as_json(scalings: Sequence[Scaling], options: Options, checks: Mapping[str, float]) -> str:
    """One line for each network and kind; of each series, columns."""
    head = {
        "what": "predictions; nothing was run on more than one GPU",
        "options": asdict(options),
        "peak_over_measured_on_one_gpu": dict(checks),
    }
    lines = ",\n".join(json.dumps(_plain(each)) for each in scalings)
    return f'{json.dumps(head)[:-1]}, "scalings": [\n{lines}\n]}}\n'


def _plain(scaling: Scaling) -> Mapping[str, object]:
    base = scaling.base
    return {
        "network": base.network.title,
        "kind": scaling.kind,
        "batch": scaling.batch,
        "compute_is_measured": base.is_own,
        "based_on": asdict(base.measured),
        "parameters": base.network.parameters,
        **{name: _columns(getattr(scaling, name)) for name in ("device", "launched", "bucketed")},
    }


def _columns(predictions: Sequence[Prediction]) -> Mapping[str, list[object]]:
    names = [field.name for field in fields(Prediction) if field.name != "network"]
    return {name: [_short(getattr(each, name)) for each in predictions] for name in names}


def _short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
