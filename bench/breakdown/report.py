"""The page of a breakdown, from its file."""

from collections.abc import Mapping
from typing import Any

from bench.kernels.table import aligned, time_of

_NAME = 100  # letters of a kernel's name that a table has room for


def heading(found: Mapping[str, Any]) -> str:
    changed = f", {' '.join(found['overrides'])}" if found["overrides"] else ""
    return f"ViT {found['size']}, {found['mode']}, batch {found['batch']}, {found['precision']}{changed}"


def parts_table(found: Mapping[str, Any]) -> str:
    """What each part took, what the roofline says, and how far apart they are."""
    whole = sum(part["seconds"] for part in found["parts"])
    roof = sum(part["predicted_s"] or 0.0 for part in found["parts"])
    lines: list[tuple[str, ...]] = [("part", "time", "of all", "roofline", "× roofline", "GFLOP", "MB")]
    for part in found["parts"]:
        lines.append(_line(part["name"], part["seconds"], whole, part["predicted_s"], part))
    lines.append(_line("all", whole, whole, roof, {"flop": 0, "bytes_moved": 0}))
    return aligned(lines, names={0})


def _line(
    name: str, seconds: float, whole: float, predicted_s: float | None, cost: Mapping[str, Any]
) -> tuple[str, ...]:
    return (
        name,
        time_of(seconds),
        f"{seconds / whole:.1%}",
        time_of(predicted_s) if predicted_s else "–",
        f"{seconds / predicted_s:.2f}" if predicted_s else "–",
        f"{cost['flop'] / 1e9:.4g}" if cost["flop"] else "–",
        f"{cost['bytes_moved'] / 1e6:.4g}" if cost["bytes_moved"] else "–",
    )


def kernels_table(found: Mapping[str, Any]) -> str:
    lines = [("kernel", "calls", "time of all", "of kernels")]
    for kernel in found["kernels"]:
        name = kernel["name"].replace("|", "¦").replace("`", "'")
        shown = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
        share = kernel["seconds"] / found["kernel_s"] if found["kernel_s"] else 0.0
        lines.append((f"`{shown}`", f"{kernel['calls']:.4g}", time_of(kernel["seconds"]), f"{share:.1%}"))
    return aligned(lines, names={0})


def sentences(found: Mapping[str, Any]) -> str:
    said = [f"A step takes {time_of(found['step_s'])}"]
    if found["busy_s"] is not None:
        share = found["idle_s"] / found["step_s"]
        said.append(f"the device is idle for {time_of(found['idle_s'])} of it ({share:.1%})")
    said.append(f"the host hands it over in {time_of(found['host_s'])}")
    if found["launches"] is not None:
        said.append(f"with {found['launches']:.0f} launches of {found['kernel_calls']:.0f} kernels")
    if found["input_copy_s"] is not None:
        said.append(
            f"its pixels come to the device in {time_of(found['input_copy_s'])}, where nothing hides that"
        )
    rates = (
        f"The roofline is of a GEMM at {found['gemm_flop_per_s'] / 1e12:.3g} TFLOP/s and a copy at "
        f"{found['copy_bytes_per_s'] / 1e9:.4g} GB/s, measured in the same run: matrix products at the one "
        "rate, then everything else that must move at the other. A part's time is between marks on the "
        "device's stream, idle gaps included."
    )
    if "speed.cuda_graph=none" in found["overrides"] and found["launches"] is not None:
        rates += " Its kernels are launched one by one: as a replayed graph the step waits less for its host."
    return ", ".join(said) + ". " + rates


def page(found: Mapping[str, Any]) -> str:
    shown = ("processor", "date", "commit", "torch", "triton", "python", "cuda", "threads")
    lines = [f"# A step on {found['device']}", "", f"- {heading(found)}"]
    lines += [f"- {name}: {found[name]}" for name in shown if name in found]
    lines += ["", sentences(found), "", parts_table(found), ""]
    lines += [f"## The {len(found['kernels'])} kernels that take the most", "", kernels_table(found), ""]
    return "\n".join(lines)
