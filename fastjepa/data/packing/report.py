"""What became of the images of a pack."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastjepa.data.folder import ImageFolder
from fastjepa.data.packing.journal import Entry

REPORT_NAME = "report.json"
_NAMED = 5  # skipped images in what is printed; the file names all


@dataclass(frozen=True)
class Report:
    """Attributes:
    images: in the folder.
    packed: of them.
    copied: of those, byte for byte.
    shards: written.
    size: of the shards, in bytes.
    classes: of the labels; 0 without.
    skipped: path -> reason.
    """

    images: int
    packed: int
    copied: int
    shards: int
    size: int
    classes: int
    skipped: dict[str, str]

    @classmethod
    def of(cls, entries: Sequence[Entry], images: ImageFolder) -> "Report":
        return cls(
            images=len(images),
            packed=sum(entry.images for entry in entries),
            copied=sum(entry.copied for entry in entries),
            shards=len(entries),
            size=sum(entry.size for entry in entries),
            classes=len(images.class_names or ()),
            skipped={path: reason for entry in entries for path, reason in entry.skipped.items()},
        )

    @property
    def first(self) -> str:
        """Of the skipped images, in words."""
        return next((f"{path}: {reason}" for path, reason in self.skipped.items()), "none")

    @property
    def reasons(self) -> dict[str, int]:
        """How many were skipped for each kind of reason."""
        return dict(Counter(reason.partition(":")[0] for reason in self.skipped.values()))


def write_report(report: Report, out: Path) -> None:
    half = out / f"{REPORT_NAME}.tmp"
    content = asdict(report) | {"reasons": report.reasons}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    half.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are no UTF-8
    half.replace(out / REPORT_NAME)


def say(report: Report, out: Path) -> str:
    """For the terminal."""
    labels = (
        f"{report.classes} classes" if report.classes else "no labels: not every image is in a class folder"
    )
    lines = [
        f"Packed {report.packed:,} of {report.images:,} images into {report.shards:,} shards in {out}: "
        f"{report.size / 1e6:,.1f} MB, {labels}"
    ]
    if report.copied:
        lines.append(f"{report.copied:,} were small enough and were copied byte for byte")
    if report.skipped:
        lines.append(f"skipped {len(report.skipped):,}; {out / REPORT_NAME} names all:")
        lines += [f"  {path}: {reason}" for path, reason in list(report.skipped.items())[:_NAMED]]
    lines.append(f"Train on them with data.name=shards data.root={out}")
    return "\n".join(lines)
