"""A plan in words and numbers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastjepa.planning.plan import Fit, Plan

GB, TERA, GIGA = 1e9, 1e12, 1e9
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer: fp32 weights, two moments",
    "shadow": "target encoder, fp32 shadow",
    "target": "target encoder, working copy",
    "activations": "activations",
    "working": "in hand in backward or update",
    "buffers": "buffers",
}


def say(plan: Plan) -> str:
    """What `fastjepa plan` prints."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_batch(plan), *_compute(plan), *_data(plan)])


def _head(plan: Plan) -> list[str]:
    config, network, device = plan.config, plan.network, plan.device
    masks = "random masks" if network.is_mae else f"masks of mode {config.masks.mode}"
    return [
        f"Predicted, not measured: {config.run.name} on {_gpus(plan.gpus)} of {device.memory / GB:g} GB, of "
        f"which {device.room / GB:g} GB are for tensors",
        f"ViT-{network.title} of {config.data.image_size} px, {config.objective.name}, {masks}: "
        f"{network.parameters / 1e6:.1f} M parameters are trained, in bf16",
    ]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _memory(plan: Plan) -> list[str]:
    fits = plan.fits.values()
    rows = [["GB of a GPU", *(f"ZeRO {fit.stage}{' *' if fit.stage == plan.stage else ''}" for fit in fits)]]
    for key, name in PARTS.items():
        rows.append([name, *(_gb(getattr(fit.parts, key)) for fit in fits)])
    rows.append(["at the peak", *(_gb(fit.parts.total) for fit in fits)])
    if any(fit.host for fit in fits):
        rows.append(["on the host, for each GPU", *(_gb(fit.host) for fit in fits)])
    rows.append(
        ["images of a micro-batch", *(f"{fit.images:,}" if fit.fits else "does not fit" for fit in fits)]
    )
    rows.append(["micro-batches of a step", *(f"{fit.accumulation:,}" if fit.fits else "" for fit in fits)])
    return _aligned(rows)


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                f"{row[0]:{widths[0]}}",
                *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def _batch(plan: Plan) -> list[str]:
    chosen, batch = plan.chosen, plan.config.optim.global_batch
    lines = [
        f"Batch: {batch:,} images, {plan.batch:,} of each GPU. The largest part of them that fits: "
        f"{_of(chosen)}, with {_settings(chosen, plan.gpus)}",
        _configured(plan),
    ]
    if not plan.network.is_mae and plan.config.masks.mode == "truncate":
        lines.append(
            "Masks: mode truncate cuts contexts to the shortest of a micro-batch: another gives other results"
        )
    return lines


def _of(fit: Fit) -> str:
    return f"{fit.images:,} image{'s' * (fit.images > 1)}"


def _settings(fit: Fit, gpus: int) -> str:
    stage = f" speed.zero_stage={fit.stage}" if gpus > 1 or fit.stage else ""
    return f"speed.accumulation={fit.accumulation}{stage}"


def _configured(plan: Plan) -> str:
    accumulation, fit = plan.config.speed.accumulation, plan.configured
    if fit is None:
        return f"As configured: speed.accumulation {accumulation} is refused on {_gpus(plan.gpus)}"
    pieces = f"each of {fit.accumulation} micro-batches" if fit.accumulation > 1 else "one micro-batch"
    return (
        f"As configured: {_of(fit)} in {pieces} at ZeRO {fit.stage}, {fit.parts.total / GB:.2f} GB: "
        f"{'fits' if fit.fits else 'does not fit'}"
    )


def _compute(plan: Plan) -> list[str]:
    work, device = plan.work, plan.device
    parts = ", ".join(f"{name} {flop / GIGA:,.3g}" for name, flop in work.flop.items())
    return [
        f"Compute: {work.image_flop / GIGA:,.1f} GFLOP an image, backward as twice forward ({parts})",
        f"Time: {plan.pace.hours:,.1f} hours for {work.images:,} images at an MFU of {device.mfu:.0%} of "
        f"{device.flop_per_s / TERA:,.0f} TFLOP/s a GPU, judging and saving left out",
    ]


def _data(plan: Plan) -> list[str]:
    at = plan.pace
    return [
        f"Data: {at.images_per_second:,.0f} images/s, for which {at.cores:,} cores must load "
        f"({-(-at.cores // plan.gpus):,} for each GPU)",
    ]


def as_dict(plan: Plan) -> dict[str, Any]:
    """For other programs: bytes, FLOPs, hours."""

    def plain(fit: Fit | None) -> dict[str, Any] | None:
        return None if fit is None else asdict(fit) | {"peak_bytes": fit.parts.total}

    return {
        "what": "predicted, not measured",
        "name": plan.config.run.name,
        "gpus": plan.gpus,
        "device": asdict(plan.device),
        "parameters": plan.network.parameters,
        "global_batch": plan.config.optim.global_batch,
        "batch_of_a_gpu": plan.batch,
        "zero_stage": plan.stage,
        "stages": [plain(fit) for fit in plan.fits.values()],
        "configured": plain(plan.configured),
        "image_flop": plan.work.image_flop,
        "image_flop_by_part": plan.work.flop,
        "images": plan.work.images,
        "hours": plan.pace.hours,
        "images_per_second": plan.pace.images_per_second,
        "cores": plan.pace.cores,
    }
