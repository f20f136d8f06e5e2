"""What a probe found, as one JSON file with everything that is needed to find it again."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.engine.folder import replace_text
from fastjepa.evaluation.intervals import Interval, of_splits, wilson
from fastjepa.probe.subjects import ProbeError

FORMAT = 1
# What a comparison asks of a file.
_COMPARED = (
    ("classes", "data"), ("fingerprint", "data"),
    ("seed", "settings"), ("splits", "settings"), ("fractions", "settings"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One accuracy of one subject.

    Attributes:
        subject: whose features.
        protocol: knn, linear, attentive or low-shot.
        variant: which of its numbers, such as k=20.
        accuracy: a fraction of the tested images; of low-shot the mean over splits.
        interval: 95 %, Wilson's, or of the splits and the images for low-shot.
        detail: what was chosen, and on which grounds.
        splits: draws of labels; 1 for all labels.
        images: tested.
        correct: which images are right, split after split, packed to bits, in base64.
    """

    subject: str
    protocol: str
    variant: str
    accuracy: float
    interval: Interval
    detail: dict[str, Any]
    splits: int
    images: int
    correct: str

    @property
    def key(self) -> tuple[str, str]:
        return self.protocol, self.variant

    def right(self) -> Tensor:
        """Which images are right: bool [splits, images]."""
        packed = np.frombuffer(base64.b64decode(self.correct), dtype=np.uint8)
        if len(packed) != -(-self.splits * self.images // 8):
            raise ValueError(f"{len(packed)} bytes are not {self.splits} x {self.images} bits")
        bits = np.unpackbits(packed, count=self.splits * self.images)
        return torch.from_numpy(bits).bool().view(self.splits, self.images)


@dataclass(frozen=True)
class Result:
    """Attributes:
    encoder: target or context.
    checkpoint: path and step, sha256 of the encoder's weights, versions and devices.
    data: where the images are from, and their fingerprint.
    settings: all that the numbers depend on besides.
    rows: of the encoder first, then of the baselines.
    collapse: measures without labels by the name of a subject.
    """

    encoder: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    collapse: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        return f"{self.encoder} encoder"

    def of_subject(self) -> dict[tuple[str, str], Row]:
        """The rows of the encoder itself, by protocol and variant."""
        return {row.key: row for row in self.rows if row.subject == self.subject}


def row_of(subject: str, protocol: str, variant: str, correct: Tensor, detail: dict[str, Any]) -> Row:
    """A row from which images are right: bool [m], or [splits, m] for draws of labels."""
    correct = correct.cpu()
    drawn = correct.ndim == 2
    correct = correct.view(-1, correct.shape[-1])  # [splits, m]
    splits, images = correct.shape
    each = correct.double().mean(dim=1).tolist()
    interval = of_splits(each, images) if drawn else wilson(int(correct.sum()), images)
    if drawn:
        detail = detail | {"of_splits": each}
    bits = base64.b64encode(np.packbits(correct.flatten().numpy()).tobytes()).decode()
    return Row(subject, protocol, variant, sum(each) / splits, interval, detail, splits, images, bits)


def write_result(path: Path, result: Result) -> None:
    """Whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"format": FORMAT} | asdict(result), indent=1) + "\n")


def read_result(path: Path) -> Result:
    """A file of `write_result`.

    Raises:
        ProbeError: it is no such file, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise ProbeError(f"{path} has format {found}, and this version reads {FORMAT}: probe again")
        rows = [Row(**row | {"interval": Interval(**row["interval"])}) for row in content.pop("rows")]
        result = Result(**content, rows=rows)
        for name, kind in _COMPARED:
            if name not in getattr(result, kind):
                raise ValueError(f"its {kind} say nothing of {name}")
        for row in rows:
            row.right()
        return result
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror}") from error
    except ProbeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProbeError(f"{path} is no result of fastjepa probe, or damaged: {error}") from error


def find_results(source: Path, encoders: Sequence[str]) -> Path:
    """A file of results, or the newest step's in the probe folder of a run, of the first encoder there is.

    Raises:
        ProbeError: there is none.
    """
    if source.is_file():
        return source
    for encoder in encoders:
        found = {
            int(path.stem.partition("-")[0]): path
            for path in (source / "probe").glob(f"*-{encoder}.json")
            if path.stem.partition("-")[0].isdigit()
        }
        if found:
            return found[max(found)]
    raise ProbeError(
        f"there is no result of {' or '.join(encoders)} in {source / 'probe'}: run fastjepa probe {source}"
    )
