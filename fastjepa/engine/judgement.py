"""What a run says of its features: verdicts beside baselines, signs of collapse, the report's summary."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastjepa.config import Config
from fastjepa.data.views import read_views
from fastjepa.data.workers import NotWanted
from fastjepa.engine.build import build_model
from fastjepa.engine.checkpoints.checkpoint import Position
from fastjepa.engine.clock import Lap, add_times
from fastjepa.engine.console import RunConsole
from fastjepa.engine.disk import Disk
from fastjepa.engine.folder import RunFolder, versions
from fastjepa.engine.images import RunImages
from fastjepa.engine.judge import UNTRAINED, Judge, Verdict
from fastjepa.engine.learner import Encoders
from fastjepa.engine.metrics import MetricsFile
from fastjepa.engine.pictures import look
from fastjepa.engine.processes.stopping import NonFinite
from fastjepa.engine.processes.world import World
from fastjepa.engine.snapshots import thin
from fastjepa.engine.tracking import Tracking
from fastjepa.evaluation.collapse import CollapseSigns, CollapseWatch, collapse_warning
from fastjepa.evaluation.showing import Showing
from fastjepa.masks import MaskSampler
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE

SNAPSHOT_IMAGES = 8


@dataclass
class Judgement:
    """Judges for one run, on rank 0, and writes what it finds.

    A judgement that is broken off because the run has been told to stop leaves no trace, and is made when the
    run goes on.

    Attributes:
        should_stop: whether the run has been told to.
        planned_steps: of the whole run.
        summary: what report/summary.json holds.
        tracking: sends rows on.
        disk: knows what cannot be written.
    """

    config: Config
    world: World
    folder: RunFolder
    console: RunConsole
    images: RunImages
    masks: MaskSampler
    metrics: MetricsFile
    should_stop: Callable[[], bool]
    tracking: Tracking
    planned_steps: int
    summary: dict[str, Any] = field(default_factory=dict)
    _watch: CollapseWatch = field(default_factory=CollapseWatch)

    def __post_init__(self) -> None:
        self.judge = Judge.of(self.images, self.config, self.world.device, self.should_stop)
        self.judge_of_ends = self.judge if self.config.probe.at_ends else None
        self.disk = Disk(self.console)

    def baselines(self, model: JEPA | MAE, position: Position) -> None:
        """Of what training starts from, and raw pixels, and a picture of the features: once in a run."""
        self.summary = self.folder.read_summary()
        if self.summary.get("judge") == self._judge_settings():
            return
        start = model.target_encoder if isinstance(model, JEPA) else model.encoder
        start.to(self.world.device)
        first_time = not self.summary
        self.console.say(self.images.note if self.config.probe.at_ends else self._note)
        try:
            verdicts, along = list[Verdict](), list[Verdict]()
            if self.judge_of_ends is not None:
                verdicts, along = self._baselines(self.judge_of_ends, start, first_time)
            if first_time:
                context, target = model.encoder, model.target_encoder if isinstance(model, JEPA) else None
                head = model.predictor if isinstance(model, JEPA) else model.decoder
                with _brought_to(self.world.device, context, head):
                    self._snapshot(Encoders(context, target, head), position)
        except NotWanted:
            self.summary = {}
            return
        self.summary |= self._description(position)
        if self.judge_of_ends is not None:
            for verdict in verdicts:
                self.console.show_verdict(0, verdict)
            self.summary["probe"] = [verdict.as_row() for verdict in verdicts]
            self.summary["probe_along"] = [verdict.as_row() for verdict in along]
        self.summary["judge"] = self._judge_settings()
        self._write_summary()

    def _baselines(
        self, judge: Judge, start: VisionTransformer, first_time: bool
    ) -> tuple[list[Verdict], list[Verdict]]:
        """As judged at the ends, and as along the way, where probes learn from fewer images."""
        is_given = self.config.run.init_from is not None
        is_untrained = first_time and not is_given
        untrained = start if is_untrained else build_model(self.config).encoder.to(self.world.device)
        encoders = {UNTRAINED: untrained}
        if first_time and is_given:
            encoders["initial weights"] = start

        def judged(quick: bool) -> list[Verdict]:
            return [judge.pixels(quick), *(judge.encoder(name, e, quick) for name, e in encoders.items())]

        verdicts = judged(quick=False)
        alike = not self.config.probe.every_steps or judge.quick_is_full
        return verdicts, verdicts if alike else judged(quick=True)

    def _judge_settings(self) -> dict[str, Any]:
        """What rows of one table must have in common."""
        queries = self.images.queries
        return asdict(self.config.probe) | {"images": 0 if queries is None else len(queries)}

    def so_far(self, encoders: Encoders, position: Position) -> None:
        """On a part of the labelled images, and a picture of the features, unless it is written already.

        Training goes on if that fails.

        Raises:
            NonFinite: there is nothing to judge any more.
        """
        if self.metrics.has(position.step, "knn_top1"):
            return
        try:
            if self.judge is not None:
                verdict = self.judge.encoder("so far", encoders.judged, quick=True)
                self._write_verdict(verdict, position)
                self.console.show_verdict(position.step, verdict)
            self._snapshot(encoders, position)
        except NotWanted:
            return
        except NonFinite:
            raise
        except Exception as error:  # a drive that fails, or a device that is full: no reason to lose a run
            what = f"{type(error).__name__}: {error}"
            self.console.warn(f"step {position.step} is not judged, and training goes on: {what}")

    def final(self, encoders: Encoders, position: Position) -> None:
        """Beside the baselines, and a picture of the features."""
        verdicts: list[Verdict] = []
        judge = self.judge_of_ends
        if judge is not None:
            if encoders.target is None:
                verdicts = [judge.encoder("trained encoder", encoders.context)]
            else:
                verdicts = [
                    judge.encoder("trained target encoder", encoders.target),
                    judge.encoder("trained context encoder", encoders.context),
                ]
            self._write_verdict(verdicts[0], position)
        names = {verdict.name for verdict in verdicts}
        kept = [row for row in self.summary.get("probe", []) if row["name"] not in names]
        self.summary |= self._description(position)
        self.summary["probe"] = kept + [verdict.as_row() for verdict in verdicts]
        self._snapshot(encoders, position)
        self._write_summary()
        if verdicts:
            self.console.show_table(self.summary["probe"])

    def watch(self, signs: CollapseSigns, position: Position) -> None:
        """Warn of collapse when it begins to show, now and then while it goes on, and say when it is over."""
        start = self.summary.get("signs_at_start")
        if start is None:
            self.summary["signs_at_start"] = asdict(signs)
            self._write_summary()
            return
        warning = collapse_warning(signs, CollapseSigns(**start))
        said = self._watch.heed(position.step, warning)
        if said is not None:
            (self.console.say if warning is None else self.console.warn)(said)

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """A row of metrics.jsonl, and for those who track the run."""
        # JSON has no infinity.
        finite = {k: v for k, v in row.items() if isinstance(v, str) or math.isfinite(v)}
        self.disk.attempt(
            self.metrics.path,
            lambda: self.metrics.write(finite),
            "training goes on without it, and its rows wait until it can be",
        )
        self.tracking.send(finite)

    def spend(self, lap: Lap, *, starting: bool) -> None:
        """Note what a process spent before its first step or after its last, in the summary."""
        if not self.summary:  # told to stop before it was written: the next process begins it
            return
        self.summary["spent_s"] = add_times(self.summary.get("spent_s", {}), lap, starting=starting)
        self.summary["planned_steps"] = self.planned_steps
        self._write_summary()

    def _write_verdict(self, verdict: Verdict, position: Position) -> None:
        self.write({"step": position.step, "images": position.images_seen, **verdict.as_metrics()})

    def _write_summary(self) -> None:
        self.disk.attempt(
            self.folder.summary,
            lambda: self.folder.write_summary(self.summary),
            "the report will lack what it says",
        )

    def _description(self, position: Position) -> dict[str, Any]:
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {
            "name": self.config.run.name,
            "objective": self.config.objective.name,
            "steps": position.step,
            "planned_steps": self.planned_steps,
            "images": position.images_seen,
            "train_s": position.train_s,
            "precision": self.config.optim.precision,
            "device": f"{self.world.size} x {name}",
            "versions": dict(versions()),
            "probe_note": self._note,
        }

    @property
    def _note(self) -> str:
        """How it judges, or why it does not."""
        if self.judge is None:
            return self.images.note
        if self.judge_of_ends is None:
            return "not judged at the start and the end, since probe.at_ends is false"
        return f"{self.images.note}; {self.judge.note}"

    @torch.no_grad()
    def _snapshot(self, encoders: Encoders, position: Position) -> None:
        """Features and masks of the same few images, spread over the set, and what else there is to show."""
        encoder, shown = encoders.judged, self.images.queries or self.images.train
        index = torch.arange(SNAPSHOT_IMAGES) * len(shown) // SNAPSHOT_IMAGES
        views = read_views(shown, index.tolist(), self.config.data.image_size)
        features = encoder(views.pixels.to(self.world.device))[:, int(encoder.shape.class_token) :]
        masks = self.masks.sample(views.image_index, epoch=0, step=position.step)
        showing = Showing()
        try:
            train = self.images.train
            showing = look(encoders, shown, views, features, masks, train, self.config, self.should_stop)
        except NotWanted:
            raise
        except Exception as error:  # a drive that fails, or a device that is full: no reason to lose a run
            what = f"{type(error).__name__}: {error}"
            self.console.warn(f"step {position.step}: only features and masks are pictured: {what}")
        self.disk.attempt(
            self.folder.snapshots,
            lambda: self.folder.write_snapshot(
                position.step,
                encoder.shape.grid,
                views.pixels,
                features,
                masks,
                showing.tensors(),
                None if showing.neighbours is None else shown.class_names,
            ),
            f"the report will lack the pictures of step {position.step}",
        )
        thin(self.folder.snapshots)


@contextmanager
def _brought_to(device: torch.device, *networks: nn.Module | None) -> Iterator[None]:
    """Within it the networks are on the device; afterwards where they were, with the bits they had."""
    present = [network for network in networks if network is not None]
    homes = [next(network.parameters()).device for network in present]
    for network in present:
        network.to(device)
    try:
        yield
    finally:
        for network, home in zip(present, homes, strict=True):
            network.to(home)
