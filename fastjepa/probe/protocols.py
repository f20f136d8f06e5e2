"""The protocols, each from features of one subject to rows of the table."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from fastjepa.evaluation.attentive import AttentiveSettings, attentive_correct, fit_attentive
from fastjepa.evaluation.collapse import rankme
from fastjepa.evaluation.intervals import SPLITS
from fastjepa.evaluation.knn import knn_correct
from fastjepa.evaluation.low_shot import low_shot_correct, split_of_classes
from fastjepa.evaluation.spectrum import alpha_req, dimension_std, lidar, uniformity
from fastjepa.evaluation.sweep import HEADS, SweepSettings, sweep
from fastjepa.probe import ATTENTIVE, KNN, LINEAR, LOW_SHOT, PROTOCOLS
from fastjepa.probe.data import ProbeImages
from fastjepa.probe.extract import Features, Wanted, token_batches
from fastjepa.probe.results import Row, row_of
from fastjepa.probe.subjects import ProbeError, Subject

_DEAD = 0.01  # a dimension that deviates less than this, of 1 for an even spread, tells nothing


@dataclass(frozen=True)
class Settings:
    """What numbers depend on besides weights and images.

    Attributes:
        protocols: of `PROTOCOLS`.
        neighbours: k of kNN.
        temperature: of its votes.
        blocks: of the wider features of the linear probe.
        linear, attentive: how those probes are trained.
        fractions: of the labels of every class, of low-shot.
        splits: draws of them, 2 to 10.
        seed: of splits, draws, initial weights and orders.
    """

    protocols: tuple[str, ...] = PROTOCOLS
    neighbours: tuple[int, ...] = (10, 20, 100)
    temperature: float = 0.07
    blocks: int = 4
    linear: SweepSettings = field(default_factory=SweepSettings)
    attentive: AttentiveSettings = field(default_factory=AttentiveSettings)
    fractions: tuple[float, ...] = (0.01, 0.1)
    splits: int = 5
    seed: int = 0


def check_settings(settings: Settings, labels: Tensor) -> None:
    """Refuse settings that images to learn from with these labels, int64 [n], cannot serve.

    Raises:
        ProbeError: which says what is allowed.
    """
    train = len(labels)
    too_many = [k for k in settings.neighbours if k > train]
    if KNN in settings.protocols and too_many:
        fit = ",".join(str(k) for k in settings.neighbours if k <= train) or str(train)
        raise ProbeError(
            f"k of {too_many[0]} neighbours, and the bank holds {train} images: use --k {fit}, or more images"
        )
    if LOW_SHOT in settings.protocols:
        if not SPLITS[0] <= settings.splits <= SPLITS[1]:
            raise ProbeError(
                f"--splits {settings.splits}: an interval takes {SPLITS[0]} to {SPLITS[1]} of them"
            )
        for fraction in settings.fractions:
            drawn = len(split_of_classes(labels, fraction, settings.seed)[0])
            if drawn < 5:
                raise ProbeError(
                    f"{fraction:.0%} of the labels are {drawn} images, and a classifier needs 5: leave "
                    "low-shot out of --protocol, or give more images"
                )
    if LINEAR in settings.protocols and train < 20:
        raise ProbeError(
            f"{train} images are too few to train a linear probe and choose its head: give 20 or more"
        )
    if LINEAR in settings.protocols and int(labels.bincount().max()) < 2:
        raise ProbeError(
            "there is one image of each class to learn from, and the linear probe chooses its head on "
            "another: leave linear out of --protocol, or give more images"
        )


@dataclass(frozen=True)
class Sample:
    """Features of one kind: fp32 [n, D] and [m, D] with labels [n] and [m], where they are computed on."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.train, self.train_labels, self.test, self.test_labels


def sample_of(features: Features, width: int | None, device: torch.device) -> Sample:
    """The last `width` columns of the pooled features, all for None."""
    train, test = features.train, features.test
    last = slice(None) if width is None else slice(train.pooled.shape[1] - width, None)
    return Sample(
        train.pooled[:, last].to(device),
        train.labels.to(device),
        test.pooled[:, last].to(device),
        test.labels.to(device),
    )


def knn_rows(name: str, sample: Sample, settings: Settings) -> Iterator[Row]:
    """Cosine neighbours of the pooled last block, as in DINO."""
    found = knn_correct(*sample.parts, settings.neighbours, settings.temperature)  # [ks, m]
    for k, right in zip(settings.neighbours, found, strict=True):
        yield row_of(name, KNN, f"k={k}", right, {"temperature": settings.temperature})


def linear_row(name: str, variant: str, sample: Sample, settings: Settings) -> Row:
    """The best head of a sweep over one kind of features."""
    found = sweep(*sample.parts, HEADS, settings.linear, settings.seed)
    detail = {
        "best": asdict(found.best),
        "held_out": {str(head): accuracy for head, accuracy in zip(found.heads, found.held_out, strict=True)},
    }
    return row_of(name, LINEAR, variant, found.correct, detail)


def low_shot_rows(name: str, sample: Sample, settings: Settings) -> Iterator[Row]:
    """Logistic regression on the pooled last block and few labels."""
    for fraction in settings.fractions:
        right, strengths = low_shot_correct(*sample.parts, fraction, settings.splits, settings.seed)
        yield row_of(name, LOW_SHOT, f"{fraction:.0%}", right, {"l2": list(strengths)})


def attentive_row(
    subject: Subject, images: ProbeImages, features: Features, wanted: Wanted, settings: Settings
) -> Row:
    """A query that asks the patch tokens of the last block."""
    train, test, how = features.train, features.test, settings.attentive
    classes = int(torch.maximum(train.labels.max(), test.labels.max())) + 1

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(settings.seed + number)
        # Of the set: where tokens are computed again, an image that cannot be read is left out again.
        count = len(train.labels) if train.tokens is not None else len(images.train)
        order = torch.randperm(count, generator=generator)
        return token_batches(subject, images.train, train, wanted, how.batch, order)

    probe = fit_attentive(epoch, len(train.labels), subject.width, classes, wanted.device, how, settings.seed)
    right = attentive_correct(
        probe, token_batches(subject, images.test, test, wanted, how.batch), wanted.device
    )
    return row_of(subject.name, ATTENTIVE, "1 query", right, {"heads": probe.heads})


def collapse_of(sample: Sample, views: Tensor | None) -> dict[str, float | None]:
    """Measures of the pooled last block of the test images; None where there is no number."""
    z = sample.test
    deviation = dimension_std(z)  # [D]
    centred = z - z.mean(dim=0)
    found: dict[str, Callable[[], float]] = {
        "std": lambda: float(deviation.mean()),
        "dead_dimensions": lambda: float((deviation < _DEAD).double().mean()),
        "rankme": lambda: float(rankme(centred)),
        "alpha_req": lambda: alpha_req(z),
        "uniformity": lambda: uniformity(z),
    }
    if views is not None:
        found["lidar"] = lambda: lidar(views)
    values = {name: measure() for name, measure in found.items()}
    # JSON has no NaN.
    return {name: value if value == value else None for name, value in values.items()}
