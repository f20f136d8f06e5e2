"""The story of a probe: open, look whether all fits, take features once, judge, write."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastjepa.data.labelled import evaluation_batches
from fastjepa.engine.folder import versions
from fastjepa.engine.judge import BATCH, PIXEL_SIZE
from fastjepa.evaluation.features import pixel_features
from fastjepa.probe import ATTENTIVE, COLLAPSE, KNN, LINEAR, LOW_SHOT
from fastjepa.probe.data import ProbeImages, open_probe_images
from fastjepa.probe.extract import GIB, Features, Wanted, check_memory, extract
from fastjepa.probe.others import other_subject
from fastjepa.probe.protocols import (
    Sample,
    Settings,
    attentive_row,
    check_settings,
    collapse_of,
    knn_rows,
    linear_row,
    low_shot_rows,
    sample_of,
)
from fastjepa.probe.results import Result, Row, write_result
from fastjepa.probe.subjects import (
    PIXELS,
    ProbeError,
    Subject,
    Trained,
    default_encoders,
    open_trained,
    subject_of,
    untrained_subject,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAST_BLOCK = "last block"


@dataclass(frozen=True)
class Request:
    """What the command was asked for.

    Attributes:
        source: a run folder, a checkpoint or a published file.
        encoders: target and context; empty for all there are.
        settings: of the protocols.
        data: folders; empty for the run's own.
        baselines: as `--baseline` names them, beside raw pixels and random initialisation.
        out: where to write instead of the run's probe folder.
        force: replace what is there.
        memory_gib: that the features of one subject may take.
        cache: a folder to keep features in; None for none.
        heads: of the encoder of a published file, where its width does not tell.
    """

    source: Path
    encoders: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    data: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    out: Path | None = None
    force: bool = False
    train_images: int | None = None
    test_images: int | None = None
    memory_gib: float = 8.0
    cache: Path | None = None
    heads: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0


def probe(request: Request, say: Callable[[str], None]) -> list[tuple[Path, Result]]:
    """Carry it out: a result for each encoder, written, with the same baselines in each.

    Raises:
        ProbeError: something does not fit; nothing has been written then.
        TooManyUnreadable: more than 5 % of the images cannot be read.
    """
    trained = open_trained(request.source, request.heads)
    encoders = request.encoders or default_encoders(trained)
    targets = {encoder: _target(request, trained, encoder, encoders) for encoder in encoders}
    device = _device(request.device)
    settings = request.settings
    how = settings.blocks, device, PRECISIONS[request.precision]

    judged = {encoder: subject_of(trained, encoder, *how) for encoder in encoders}
    subjects = [*judged.values(), untrained_subject(trained, *how)]
    subjects += [other_subject(name, *how) for name in dict.fromkeys(request.baselines)]
    channels = trained.model.encoder.shape.channels
    images = open_probe_images(
        request.data, trained.config, channels, settings.seed, request.train_images, request.test_images
    )
    assert images.train.labels is not None
    check_settings(settings, images.train.labels)
    wanted = Wanted(
        blocks=settings.blocks,
        tokens=ATTENTIVE in settings.protocols,
        views=COLLAPSE in settings.protocols,
        memory=int(request.memory_gib * GIB),
        device=device,
        precision=f"{request.precision} on {device.type}",
        workers=request.workers,
        cache=request.cache,
    )
    say(f"{trained.path}, step {trained.step}; {images.note}")
    for line in check_memory(subjects, images, wanted):
        say(line)

    rows: dict[str, list[Row]] = {}
    collapse: dict[str, dict[str, float | None]] = {}
    pixel_size = min(subjects[0].size, PIXEL_SIZE)
    pixel_bytes = 4 * (len(images.train) + len(images.test)) * images.train.channels * pixel_size**2
    if pixel_bytes > wanted.memory:
        say(f"{PIXELS} are left out: they take {pixel_bytes / GIB:.3g} GiB, more than --memory allows")
    else:
        _judge_pixels(images, pixel_size, wanted, settings, rows, collapse, say)
    # One after another where views differ, so that no more than the alike ones are in memory at once.
    for size in sorted({subject.size for subject in subjects}):
        alike = [subject for subject in subjects if subject.size == size]
        before = time.perf_counter()
        features = extract(alike, images, wanted)
        say(f"features of {len(alike)} encoders: {time.perf_counter() - before:.0f} s")
        for subject in alike:
            before = time.perf_counter()
            found = features.pop(subject.name)
            check_settings(settings, found.train.labels)  # some may have been unreadable
            rows[subject.name] = list(_judge(subject, images, found, wanted, settings, say))
            if COLLAPSE in settings.protocols:
                last = sample_of(found, subject.width, device)
                collapse[subject.name] = collapse_of(last, found.views)
            say(f"{subject.name}: {time.perf_counter() - before:.0f} s")

    written = []
    others = [PIXELS, *(subject.name for subject in subjects[len(judged) :])]
    for encoder, subject in judged.items():
        names = [subject.name, *others]
        result = Result(
            encoder,
            _checkpoint(trained, subject, device, request.precision),
            {
                "note": images.note,
                "fingerprint": images.fingerprint,
                "folders": list(request.data),
                "train_images": len(images.train),
                "test_images": len(images.test),
                "classes": list(images.train.class_names or ()),
                "view": subject.size,
                "pixel_view": pixel_size,
            },
            asdict(settings) | {"baselines": list(request.baselines)},
            [row for name in names for row in rows.get(name, [])],
            {name: collapse[name] for name in names if name in collapse},
        )
        write_result(targets[encoder], result)
        written.append((targets[encoder], result))
    return written


def _judge(
    subject: Subject,
    images: ProbeImages,
    features: Features,
    wanted: Wanted,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[Row]:
    last = sample_of(features, subject.width, wanted.device)
    yield from _told(_of_pooled(subject.name, last, settings), say)
    if LINEAR in settings.protocols and settings.blocks > 1:
        wide = sample_of(features, None, wanted.device)
        variant = f"last {settings.blocks} blocks"
        yield from _told(iter([linear_row(subject.name, variant, wide, settings)]), say)
    if ATTENTIVE in settings.protocols:
        yield from _told(iter([attentive_row(subject, images, features, wanted, settings)]), say)


def _of_pooled(name: str, sample: Sample, settings: Settings) -> Iterator[Row]:
    """What needs one vector for each image, so that it is there for raw pixels too."""
    if KNN in settings.protocols:
        yield from knn_rows(name, sample, settings)
    if LINEAR in settings.protocols:
        yield linear_row(name, LAST_BLOCK, sample, settings)
    if LOW_SHOT in settings.protocols:
        yield from low_shot_rows(name, sample, settings)


def _told(rows: Iterator[Row], say: Callable[[str], None]) -> Iterator[Row]:
    for row in rows:
        say(f"  {row.subject}  {row.protocol} {row.variant}: {100 * row.accuracy:.1f} %")
        yield row


def _judge_pixels(
    images: ProbeImages,
    size: int,
    wanted: Wanted,
    settings: Settings,
    rows: dict[str, list[Row]],
    collapse: dict[str, dict[str, float | None]],
    say: Callable[[str], None],
) -> None:
    """Raw pixels of views no larger than 32 x 32. They have no tokens, so no attentive probe."""
    parts = []
    for part in (images.train, images.test):
        with closing(evaluation_batches(part, size, BATCH, workers=wanted.workers)) as batches:
            parts += [found.to(wanted.device) for found in pixel_features(batches)]
    sample = Sample(*parts)
    check_settings(settings, sample.train_labels)
    rows[PIXELS] = list(_told(_of_pooled(PIXELS, sample, settings), say))
    if COLLAPSE in settings.protocols:
        collapse[PIXELS] = collapse_of(sample, None)


def _target(request: Request, trained: Trained, encoder: str, encoders: tuple[str, ...]) -> Path:
    """Where the result goes; refused before anything is computed."""
    if request.out is not None:
        if len(encoders) > 1:
            raise ProbeError("--out is one file, and two encoders are probed: choose with --encoder target")
        path = request.out
    elif trained.run is None:
        raise ProbeError(
            f"{trained.path} belongs to no run, whose folder would hold the result: give --out FILE"
        )
    else:
        path = trained.run / "probe" / f"{trained.step}-{encoder}.json"
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ProbeError(
            f"cannot write {path}: {above} is no folder that may be written to: give another --out"
        )
    if path.is_dir():
        raise ProbeError(f"{path} is a folder: give --out the name of a file")
    if path.exists() and not request.force:
        raise ProbeError(f"{path} exists; --force replaces it, --out writes elsewhere")
    return path


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ProbeError("--device cuda, but torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _checkpoint(
    trained: Trained, subject: Subject, device: torch.device, precision: str
) -> dict[str, object]:
    return {
        "path": str(trained.path),
        "step": trained.step,
        "encoder_sha256": subject.fingerprint,
        "config": None if trained.config is None else trained.config.to_dict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": precision,
        "versions": dict(versions()),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
