"""Writes docs/performance.md, its pictures and the table in README.md from what is in bench/results.

    python -m bench.performance_page            # or: make performance
    python -m bench.performance_page --check    # fails if they are not what the results give

Nobody edits these by hand. What has not been measured says so.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.accuracy.summary import LOOP
from bench.breakdown import report as breakdown
from bench.kernels.results import RESULTS
from bench.kernels.table import Row, aligned, summary
from bench.throughput import report as throughput
from bench.throughput.entries import IJEPA, MAE

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
SIZES = ("base", "large", "huge")  # that a GPU is asked for
OURS = ("fastjepa I-JEPA, truncate", "fastjepa I-JEPA, budget", "fastjepa I-JEPA, packed")
NOT_MEASURED = "not measured"

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Device:
    """What one folder of results holds, the newest of each kind.

    Attributes:
        throughput: of each size, the file it is in and its entry there.
        breakdowns: of each size and mask mode.
        kernels: of the comparison of kernels; None without one.
        accuracy: of the comparison by accuracy; None without one.
        picture: the newest chart of throughput.
    """

    folder: str
    throughput: Mapping[str, tuple[Content, Content]]
    breakdowns: Mapping[tuple[str, str], Content]
    kernels: Content | None
    accuracy: Content | None
    picture: Path | None

    @property
    def name(self) -> str:
        found = [file for file, _ in self.throughput.values()] + list(self.breakdowns.values())
        return str((self.kernels or found[0])["device"]) if self.kernels or found else self.folder

    @property
    def is_gpu(self) -> bool:
        return self.folder != "cpu"


def load(results: Path) -> list[Device]:
    """Every device's, GPUs first."""
    folders = [path for path in results.iterdir() if path.is_dir()] if results.is_dir() else []
    devices = [
        _device(folder) for folder in sorted(folders, key=lambda path: (path.name == "cpu", path.name))
    ]
    return [d for d in devices if d.throughput or d.breakdowns or d.kernels or d.accuracy]


def _device(folder: Path) -> Device:
    measured: dict[str, tuple[Content, Content]] = {}
    for file in _newest_last(folder, "throughput-*.json"):
        for size in file["sizes"]:
            if any(row["images_per_s"] for row in size["rows"]):
                measured[size["size"]] = file, size
    parts = {(each["size"], each["mode"]): each for each in _newest_last(folder, "breakdown-*.json")}
    kernels = list(_newest_last(folder, "[0-9]*.json"))
    accuracy = list(_newest_last(folder, "accuracy/accuracy.json"))
    pictures = sorted(folder.glob("throughput-*.png"))
    return Device(
        folder.name,
        measured,
        parts,
        kernels[-1] if kernels else None,
        accuracy[-1] if accuracy else None,
        pictures[-1] if pictures else None,
    )


def _newest_last(folder: Path, pattern: str) -> Iterator[Content]:
    """Their names end in a date."""
    for path in sorted(folder.glob(pattern), key=lambda path: path.stem[-20:]):
        yield json.loads(path.read_text(encoding="utf-8"))


def page(devices: Sequence[Device]) -> str:
    lines = [
        "# Performance",
        "",
        "Written by `make performance` from the files in `bench/results`, and by nobody's hand. Results are "
        "as they were measured but for a commit that was named afterwards, which says so. To measure: "
        "`make bench-gpu`, `make bench-throughput`, `make bench-breakdown`, `make bench-accuracy`, "
        "`make bench`. How the kernels are measured is in [Benchmarks of the kernels](benchmarks.md).",
        "",
    ]
    if not any(device.is_gpu for device in devices):
        lines += [f"On a GPU: {NOT_MEASURED}.", ""]
    for device in devices:
        lines += [f"## {device.name}", "", *_throughput(device), *_breakdowns(device), *_accuracy(device)]
        lines += _kernels(device)
    return "\n".join(lines).rstrip() + "\n"


def _about(file: Content) -> str:
    noted = {"commit": f" ({file['commit_note']})"} if file.get("commit_note") else {}
    return ", ".join(
        f"{name} {file[name]}{noted.get(name, '')}"
        for name in ("date", "commit", "torch", "triton", "cuda", "threads")
        if file.get(name)
    )


def _throughput(device: Device) -> list[str]:
    lines = ["### Training throughput", ""]
    asked = SIZES if device.is_gpu else ()
    for size in dict.fromkeys((*asked, *device.throughput)):
        if size not in device.throughput:
            lines += [f"ViT {size}: {NOT_MEASURED}.", ""]
            continue
        file, found = device.throughput[size]
        lines += [
            f"**{throughput.heading(found)}** ({_about(file)})",
            "",
            throughput.masks_note(found),
            "",
            throughput.markdown(throughput.complete(found["rows"])),
            "",
        ]
    if not device.throughput:
        return lines if asked else [*lines, f"{NOT_MEASURED.capitalize()}.", ""]
    if device.picture is not None:
        lines += [f"![Images per second](images/{picture_name(device)})", ""]
    return [*lines, throughput.NOTES, ""]


def _breakdowns(device: Device) -> list[str]:
    lines = ["### Where a step's time goes", ""]
    if not device.breakdowns:
        return [*lines, f"{NOT_MEASURED.capitalize()}.", ""]
    for found in device.breakdowns.values():
        lines += [f"**{breakdown.heading(found)}** ({_about(found)})", "", breakdown.sentences(found), ""]
        lines += [breakdown.parts_table(found), "", breakdown.kernels_table(found), ""]
    return lines


def _accuracy(device: Device) -> list[str]:
    lines = ["### Accuracy against time", ""]
    if device.accuracy is None:
        return [*lines, f"{NOT_MEASURED.capitalize()}.", ""]
    facts = device.accuracy.get("facts", {})
    said = device.accuracy.get("verdict", {}).get("linear_top1", [])
    where = f"bench/results/{device.folder}/accuracy/accuracy.md"
    return [*lines, *said, "", LOOP, "", f"All of it: `{where}` ({_about(facts)}).", ""]


def _kernels(device: Device) -> list[str]:
    lines = ["### Kernels", ""]
    if device.kernels is None:
        return [*lines, f"{NOT_MEASURED.capitalize()}.", ""]
    known = {each.name for each in fields(Row)}
    rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in device.kernels["rows"]]
    return [*lines, f"({_about(device.kernels)})", "", summary(rows), ""]


def readme_table(devices: Sequence[Device]) -> str:
    """Images per second of what matters, a line for each device and size."""
    columns = (
        "images/s",
        "batch",
        MAE,
        IJEPA,
        *OURS,
        "their context tokens",
        "truncate × reference MAE",
        "truncate, of a measured GEMM",
        "versions",
    )
    lines: list[tuple[str, ...]] = [columns]
    for device in devices:
        for size in dict.fromkeys((*(SIZES if device.is_gpu else ()), *device.throughput)):
            lines.append(_readme_line(device, size))
    if not any(device.is_gpu for device in devices):
        lines.append(("a GPU", *[NOT_MEASURED] * (len(columns) - 1)))
    return aligned(lines, names={0, len(columns) - 1})


def _readme_line(device: Device, size: str) -> tuple[str, ...]:
    file, found = device.throughput.get(size, (None, None))
    rows = {row["name"]: row for row in found["rows"]} if found else {}

    def cell(name: str, key: str, form: str) -> str:
        value = rows.get(name, {}).get(key)
        return NOT_MEASURED if value is None else f"{value:{form}}"

    speeds = [cell(name, "images_per_s", ".4g") for name in (MAE, IJEPA, *OURS)]
    tokens = [
        f"{rows[name]['context_tokens']:.1f}" for name in OURS if rows.get(name, {}).get("images_per_s")
    ]
    versions = [f"{name} {file[name]}" for name in ("torch", "triton") if file and file.get(name)]
    return (
        f"{device.name}, ViT {size}",
        str(found["batch"]) if found else NOT_MEASURED,
        *speeds,
        ", ".join(tokens) or NOT_MEASURED,
        cell(OURS[0], "over_mae", ".2f"),
        cell(OURS[0], "mfu", ".1%"),
        ", ".join(versions) or NOT_MEASURED,
    )


def with_table(readme: str, table: str) -> str:
    """README.md with the text between the markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must have {BEGIN} and after it {END}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def picture_name(device: Device) -> str:
    return f"throughput_{device.folder}.png"


def outputs(results: Path, root: Path) -> dict[Path, bytes]:
    """Every file that is written, and what is in it."""
    devices = load(results)
    readme = root / "README.md"
    files = {
        root / "docs" / "performance.md": page(devices).encode(),
        readme: with_table(readme.read_text(encoding="utf-8"), readme_table(devices)).encode(),
    }
    for device in devices:
        if device.picture is not None:
            files[root / "docs" / "images" / picture_name(device)] = device.picture.read_bytes()
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.performance_page", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail where something would change"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    asked = parser.parse_args(arguments)
    try:
        files = outputs(asked.results, asked.root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    for path in stale:
        shown = path.relative_to(asked.root)
        if asked.check:
            print(f"{shown} is not what bench/results gives: run `make performance`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
            print(f"Wrote {shown}")
    return 1 if asked.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
