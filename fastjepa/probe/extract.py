"""Features of every subject, from one pass over the images for all subjects that see them alike.

Memory is known before it is used: 4 bytes for each pooled value, 2 for each value of tokens, which are kept
only while they fit in what is left and are computed again in every epoch otherwise.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.data.labelled import evaluation_batches
from fastjepa.data.subset import Subset
from fastjepa.data.transforms import Augmentation
from fastjepa.data.views import ImageSet, read_views
from fastjepa.engine.judge import BATCH
from fastjepa.evaluation.features import mean_of_tokens
from fastjepa.probe.data import ProbeImages
from fastjepa.probe.subjects import ProbeError, Subject

GIB = 2**30
VIEW_IMAGES, VIEWS = 1000, 5  # of LiDAR
# What I-JEPA itself is trained with; the same for every run, so that the measure compares them.
VIEW = Augmentation(crop_scale=(0.3, 1.0))
_CACHE = "features"  # what a file of ours says it is

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Features of some images, on the host.

    Attributes:
        pooled: fp32 [n, blocks * D]: means over the tokens, the last block last.
        labels: int64 [n].
        tokens: fp16 [n, N, D] of the last block; None if they are not kept.
    """

    pooled: Tensor
    labels: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """Of one subject; `views` [n, q, D] are random views of the same images, or None."""

    train: Part
    test: Part
    views: Tensor | None


@dataclass(frozen=True)
class Wanted:
    """What of features is wanted, and how it is computed.

    Attributes:
        blocks: the last so many.
        tokens, views: whether those of the last block and of random views are asked for.
        memory: bytes that the features of one subject may take.
        workers: processes that read images.
        precision: of the encoders, in words; part of what a cache is for.
    """

    blocks: int
    tokens: bool
    views: bool
    memory: int
    device: torch.device
    precision: str
    workers: int = 0
    cache: Path | None = None


def pooled_bytes(subject: Subject, images: ProbeImages, wanted: Wanted) -> int:
    views = min(VIEW_IMAGES, len(images.test)) * VIEWS * subject.width if wanted.views else 0
    pooled = (len(images.train) + len(images.test)) * subject.width * wanted.blocks
    return 4 * (pooled + views)


def token_bytes(subject: Subject, images: ProbeImages) -> int:
    return 2 * (len(images.train) + len(images.test)) * subject.tokens * subject.width


def keeps_tokens(subject: Subject, images: ProbeImages, wanted: Wanted) -> bool:
    return wanted.tokens and _total(subject, images, wanted) <= wanted.memory


def _total(subject: Subject, images: ProbeImages, wanted: Wanted) -> int:
    return pooled_bytes(subject, images, wanted) + token_bytes(subject, images)


def check_memory(subjects: Iterable[Subject], images: ProbeImages, wanted: Wanted) -> list[str]:
    """What the features of each subject will take, in words.

    Raises:
        ProbeError: more than is allowed even without tokens.
    """
    lines = []
    for subject in subjects:
        pooled = pooled_bytes(subject, images, wanted)
        if pooled > wanted.memory:
            raise ProbeError(
                f"features of the {subject.name} take {pooled / GIB:.3g} GiB, and "
                f"{wanted.memory / GIB:.3g} are allowed: raise --memory, or use fewer "
                "--train-images, or --blocks 1"
            )
        line = f"{subject.name}: {pooled / 1e6:,.0f} MB of pooled features"
        if wanted.tokens:
            tokens = f"{token_bytes(subject, images) / 1e6:,.0f} MB of tokens"
            kept = keeps_tokens(subject, images, wanted)
            line += f", {tokens}" if kept else f"; {tokens} are too many, so each epoch computes them again"
        lines.append(line)
    return lines


def extract(subjects: Sequence[Subject], images: ProbeImages, wanted: Wanted) -> dict[str, Features]:
    """Features of each subject by its name, read from the cache where they are there.

    Raises:
        ProbeError: features that are not finite.
        TooManyUnreadable: more than 5 % of the images cannot be read.
    """
    found = {}
    for subject in subjects:
        cached = _read_cache(subject, images, wanted)
        if cached is not None:
            found[subject.name] = cached
    left = [subject for subject in subjects if subject.name not in found]
    for size in sorted({subject.size for subject in left}):
        alike = [subject for subject in left if subject.size == size]
        for subject, features in zip(alike, _extract_alike(alike, images, size, wanted), strict=True):
            _check_finite(subject, features)
            _write_cache(subject, images, wanted, features)
            found[subject.name] = features
    return found


def token_batches(
    subject: Subject, images: ImageSet, part: Part, wanted: Wanted, batch: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The last block's tokens [b, N, D] with labels [b], kept or computed again.

    Args:
        images: that `part` is of.
        batch: images at a time.
        order: int64, of rows of the part; None for as they are.
    """
    if part.tokens is not None:
        rows = torch.arange(len(part.labels)) if order is None else order
        for some in rows.split(batch):
            yield part.tokens[some], part.labels[some]
        return
    chosen = images if order is None else Subset(images, order)
    with closing(evaluation_batches(chosen, subject.size, batch, workers=wanted.workers)) as batches:
        for pixels, labels in batches:
            yield subject.blocks(as_channels(pixels, subject.channels).to(wanted.device))[-1], labels


def as_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images for an encoder of colours: [B, 1, H, W] -> [B, channels, H, W], repeated."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] != 1:
        raise ProbeError(
            f"the encoder takes {channels} channel(s), and these images have {images.shape[1]}: give --data "
            "with images of as many, or an encoder that takes them"
        )
    return images.expand(-1, channels, -1, -1)


@dataclass
class _Collected:
    pooled: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


def _extract_alike(
    subjects: Sequence[Subject], images: ProbeImages, size: int, wanted: Wanted
) -> list[Features]:
    train = _one_pass(subjects, images.train, images, size, wanted)
    test = _one_pass(subjects, images.test, images, size, wanted)
    views = _views(subjects, images.test, size, wanted) if wanted.views else [None] * len(subjects)
    return [Features(a, b, c) for a, b, c in zip(train, test, views, strict=True)]


def _one_pass(
    subjects: Sequence[Subject], part: ImageSet, images: ProbeImages, size: int, wanted: Wanted
) -> list[Part]:
    collected = [_Collected() for _ in subjects]
    keeps = [keeps_tokens(subject, images, wanted) for subject in subjects]
    labels = []
    with closing(evaluation_batches(part, size, BATCH, workers=wanted.workers)) as batches:
        for pixels, some in batches:
            labels.append(some)
            for subject, into, keep in zip(subjects, collected, keeps, strict=True):
                blocks = subject.blocks(as_channels(pixels, subject.channels).to(wanted.device))
                into.pooled.append(mean_of_tokens(blocks, len(pixels)).cpu())  # [b, blocks * D]
                if keep:
                    into.tokens.append(blocks[-1].half().cpu())  # [b, N, D]
    if not labels:
        raise ProbeError("none of the images could be read")
    every = torch.cat(labels)
    return [
        Part(torch.cat(into.pooled), every, torch.cat(into.tokens) if into.tokens else None)
        for into in collected
    ]


def _views(subjects: Sequence[Subject], images: ImageSet, size: int, wanted: Wanted) -> list[Tensor | None]:
    """Features of random views of the same images, spread over the set: [n, q, D] each."""
    count = min(VIEW_IMAGES, len(images))
    index = torch.arange(count) * len(images) // count
    found: list[list[Tensor]] = [[] for _ in subjects]
    for number in range(VIEWS):
        each: list[list[Tensor]] = [[] for _ in subjects]
        for some in index.split(BATCH):
            pixels = read_views(images, some.tolist(), size, VIEW, epoch=number).pixels
            for subject, into in zip(subjects, each, strict=True):
                blocks = subject.blocks(as_channels(pixels, subject.channels).to(wanted.device))
                into.append(mean_of_tokens(blocks[-1:], len(pixels)).cpu())
        for into, one in zip(found, each, strict=True):
            into.append(torch.cat(one))
    return [torch.stack(views, dim=1) for views in found]


def _check_finite(subject: Subject, features: Features) -> None:
    if not (features.train.pooled.isfinite().all() and features.test.pooled.isfinite().all()):
        raise ProbeError(
            f"features of the {subject.name} are not finite: its run has diverged, so probe an earlier "
            "checkpoint; or, with --precision bf16, try fp32"
        )


def _cache_file(subject: Subject, images: ProbeImages, wanted: Wanted) -> Path | None:
    """Named after everything that its content depends on."""
    if wanted.cache is None:
        return None
    parts = (
        subject.fingerprint, images.fingerprint, subject.size, wanted.blocks, wanted.precision,
        keeps_tokens(subject, images, wanted), wanted.views,
    )  # fmt: skip
    return wanted.cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.safetensors"


def _write_cache(subject: Subject, images: ProbeImages, wanted: Wanted, features: Features) -> None:
    file = _cache_file(subject, images, wanted)
    if file is None:
        return
    tensors: dict[str, Tensor] = {}
    for name, part in (("train", features.train), ("test", features.test)):
        tensors |= {f"{name}.pooled": part.pooled, f"{name}.labels": part.labels}
        if part.tokens is not None:
            tensors[f"{name}.tokens"] = part.tokens
    if features.views is not None:
        tensors["views"] = features.views
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    try:
        save_file(tensors, partial, metadata={"kind": _CACHE, "subject": subject.name})
        os.replace(partial, file)
    except (SafetensorError, OSError) as error:  # a full disk; the probe can do without
        _log.warning("features of the %s were not kept in %s: %s", subject.name, file.parent, error)
    finally:
        partial.unlink(missing_ok=True)


def _read_cache(subject: Subject, images: ProbeImages, wanted: Wanted) -> Features | None:
    file = _cache_file(subject, images, wanted)
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        parts = [
            Part(tensors[f"{name}.pooled"], tensors[f"{name}.labels"], tensors.get(f"{name}.tokens"))
            for name in ("train", "test")
        ]
    except (SafetensorError, OSError, KeyError) as error:
        _log.warning("%s is damaged (%s): the features are computed again", file, error)
        return None
    return Features(parts[0], parts[1], tensors.get("views"))
