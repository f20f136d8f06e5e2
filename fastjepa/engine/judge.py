"""Judgement while training: kNN and a linear probe on held-out labels, beside honest baselines."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastjepa.config import Config, ProbeConfig
from fastjepa.data.labelled import evaluation_batches
from fastjepa.data.unreadable import MAX_BAD_FRACTION
from fastjepa.data.views import ImageSet
from fastjepa.data.workers import NotWanted
from fastjepa.engine.images import RunImages
from fastjepa.engine.processes.stopping import NonFinite
from fastjepa.evaluation.collapse import between_image_std, rankme, token_std
from fastjepa.evaluation.features import pixel_features, pool_features, standardise
from fastjepa.evaluation.knn import knn_accuracy
from fastjepa.evaluation.linear import linear_accuracy
from fastjepa.models import VisionTransformer

BATCH = 256  # images per forward pass of an evaluation
STD_IMAGES = 256  # enough tokens for their standard deviation
PIXEL_SIZE = 32  # of raw pixels as features: at 224 x 224 x 3 a linear probe would have 150,000 inputs
RAW_PIXELS, UNTRAINED = "raw pixels", "untrained encoder"


@dataclass(frozen=True)
class Verdict:
    """One row of the table. Accuracies are fractions of the held-out images."""

    name: str
    knn_top1: float
    linear_top1: float
    rankme: float  # of the mean-pooled features of the held-out images, their mean taken off
    target_std: float | None = None  # of their tokens before the final norm; None for pixels
    between_image_std: float | None = None

    def as_metrics(self) -> dict[str, float]:
        """The keys of metrics.jsonl."""
        return {"knn_top1": self.knn_top1, "linear_top1": self.linear_top1, "rankme": self.rankme}

    def as_row(self) -> dict[str, float | str]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Judge:
    """Probes features with labelled images; raises NotWanted once it is told to stop.

    Attributes:
        bank: labelled images that a probe may learn from.
        queries: labelled images it is judged on.
        probe: how many images, how many neighbours.
        size: pixels of the view.
        workers: processes that read images; 0 reads here.
        worker_timeout_s: how long to wait for one of them.
        device: where encoders run.
        seed: of the split on which the linear probe's regularisation is chosen.
        should_stop: whether the run has been told to.
        max_bad_fraction: of the images, how many may be unreadable.
    """

    bank: ImageSet
    queries: ImageSet
    probe: ProbeConfig
    size: int
    workers: int
    worker_timeout_s: float
    device: torch.device
    seed: int
    should_stop: Callable[[], bool]
    max_bad_fraction: float = MAX_BAD_FRACTION

    @classmethod
    def of(
        cls, images: RunImages, config: Config, device: torch.device, should_stop: Callable[[], bool]
    ) -> "Judge | None":
        """The judge of a run; None if it has no labelled images."""
        if images.bank is None or images.queries is None:
            return None
        return cls(
            images.bank,
            images.queries,
            config.probe,
            config.data.image_size,
            config.speed.workers,
            config.speed.worker_timeout_s,
            device,
            config.run.seed,
            should_stop,
            config.data.max_bad_fraction,
        )

    def pixels(self, quick: bool = False) -> Verdict:
        """Judge the raw pixels, of views no larger than 32 x 32; `quick` takes fewer images."""
        bank, queries = self._counts(quick)
        size = min(self.size, PIXEL_SIZE)
        return self._judge(
            RAW_PIXELS,
            self._pixels(self._batches(self.bank, bank, size)),
            self._pixels(self._batches(self.queries, queries, size)),
        )

    def encoder(self, name: str, encoder: VisionTransformer, quick: bool = False) -> Verdict:
        """Judge the mean-pooled tokens of an encoder; `quick` takes fewer images."""
        bank, queries = self._counts(quick)
        first = int(encoder.shape.class_token)  # patches only

        @torch.no_grad()
        def tokens(images: Tensor, final_norm: bool = True) -> Tensor:
            return encoder(images.to(self.device), final_norm=final_norm)[:, first:]  # [B, N, D]

        few = self._batches(self.queries, min(queries, STD_IMAGES))
        return self._judge(
            name,
            pool_features(tokens, self._batches(self.bank, bank), self.device),
            pool_features(tokens, self._batches(self.queries, queries), self.device),
            torch.cat([tokens(images, final_norm=False) for images, _ in few]),
        )

    @property
    def note(self) -> str:
        """How it judges, for the report."""
        pixels = f"; raw pixels are views of {PIXEL_SIZE} x {PIXEL_SIZE}" if self.size > PIXEL_SIZE else ""
        k = self.probe.neighbours
        return f"kNN of {k} cosine neighbours and a linear probe, both on standardised features{pixels}"

    @property
    def quick_is_full(self) -> bool:
        """Whether as many images are taken along the way as at the ends."""
        return self._counts(quick=True) == self._counts(quick=False)

    def _counts(self, quick: bool) -> tuple[int, int]:
        """How many images a probe learns from, and how many it is judged on."""
        probe = self.probe
        wanted = (probe.bank, probe.queries) if quick else (probe.final_bank, probe.final_queries)
        return min(wanted[0], len(self.bank)), min(wanted[1], len(self.queries))

    def _pixels(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        features, labels = pixel_features(batches)
        return features.to(self.device), labels.to(self.device)

    def _batches(
        self, images: ImageSet, limit: int, size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return evaluation_batches(
            images,
            size or self.size,
            BATCH,
            limit=limit,
            workers=self.workers,
            worker_timeout_s=self.worker_timeout_s,
            should_stop=self.should_stop,
            max_bad_fraction=self.max_bad_fraction,
        )

    def _judge(
        self,
        name: str,
        bank: tuple[Tensor, Tensor],
        queries: tuple[Tensor, Tensor],
        hidden: Tensor | None = None,
    ) -> Verdict:
        if not (bank[0].isfinite().all() and queries[0].isfinite().all()):
            raise NonFinite(f"the features of the {name} are not finite: the run has diverged")
        # Neighbours are sought among the features that the linear probe sees. Unstandardised, what all images
        # have in common drowns what tells them apart, for raw pixels (by 2 to 3 points) most of all.
        near, asked = standardise(bank[0], queries[0])
        knn = knn_accuracy(near, bank[1], asked, queries[1], k=min(self.probe.neighbours, len(near)))
        if self.should_stop():
            raise NotWanted
        return Verdict(
            name,
            knn_top1=knn,
            linear_top1=linear_accuracy(*bank, *queries, seed=self.seed).accuracy,
            rankme=float(rankme(queries[0] - queries[0].mean(dim=0))),
            target_std=None if hidden is None else float(token_std(hidden)),
            between_image_std=None if hidden is None else float(between_image_std(hidden)),
        )
