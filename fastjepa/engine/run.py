"""Everything around the training loop of one run: its folder, checkpoints, log lines and judgement."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fastjepa.config import Config
from fastjepa.data.loader import Batch
from fastjepa.data.order import GlobalOrder
from fastjepa.data.views import read_views
from fastjepa.engine.checkpoint import (
    CheckpointError,
    Position,
    checkpoint_path,
    keep_newest,
    load_checkpoint,
    newest_good,
    write_checkpoint,
)
from fastjepa.engine.clock import StepClock
from fastjepa.engine.console import Progress, RunConsole
from fastjepa.engine.folder import RunFolder, versions
from fastjepa.engine.images import RunImages
from fastjepa.engine.judge import UNTRAINED, Judge, Verdict
from fastjepa.engine.launch import World
from fastjepa.engine.learner import Learner
from fastjepa.engine.metrics import MetricsFile
from fastjepa.engine.recorder import NonFinite, Recorder
from fastjepa.engine.schedules import Rates, Schedule
from fastjepa.evaluation.collapse import CollapseSigns, collapse_warning
from fastjepa.masks import MaskSampler
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE, Step

SNAPSHOT_IMAGES = 8


@dataclass
class Run:
    """What one run writes and says. Methods are called on every rank; rank 0 writes.

    Attributes:
        position: how far it is.
        summary: what report/summary.json holds.
    """

    config: Config
    world: World
    folder: RunFolder
    console: RunConsole
    images: RunImages
    masks: MaskSampler
    order: GlobalOrder
    schedule: Schedule
    clock: StepClock = field(default_factory=StepClock)
    summary: dict[str, Any] = field(default_factory=dict)
    _collapsing: bool = False

    def __post_init__(self) -> None:
        self.position = Position(0, 0, 0.0, len(self.images.train))
        self.recorder = Recorder(self.world)
        self.metrics = MetricsFile(self.folder.metrics)
        self.judge = Judge.of(self.images, self.config, self.world.device)

    def judge_baselines(self, model: JEPA | MAE) -> None:
        """Judge raw pixels and the untrained encoder, and picture its features: once in a run."""
        if not self.world.is_main:
            return
        self.summary = self.folder.read_summary()
        if self.summary:
            return
        encoder = (model.target_encoder if isinstance(model, JEPA) else model.encoder).to(self.world.device)
        self.console.say(self.images.note)
        self.summary = self._description()
        if self.judge is not None:
            verdicts = [self.judge.pixels(), self.judge.encoder(UNTRAINED, encoder)]
            for verdict in verdicts:
                self.console.show_verdict(0, verdict)
            self.summary["probe"] = [verdict.as_row() for verdict in verdicts]
        self._snapshot(encoder)
        self.folder.write_summary(self.summary)

    def resume(self, learner: Learner) -> None:
        """Take up the newest good checkpoint of the folder, if there is one."""
        found, damaged = self.world.on_main(lambda: newest_good(self.folder.checkpoints)) or (None, [])
        for line in damaged:
            self.console.warn(f"{line}; taking the one before it")
        step = self.world.worst(-1 if found is None else int(found.name.removeprefix("step_")))
        if step < 0:
            if damaged:
                raise CheckpointError(
                    f"no checkpoint in {self.folder.checkpoints} can be used; repair one, or delete them to "
                    "start over"
                )
            return
        checkpoint = load_checkpoint(checkpoint_path(self.folder.checkpoints, step))
        before, now = checkpoint.position.dataset_images, self.position.dataset_images
        if before != now:
            raise CheckpointError(
                f"{checkpoint.path} was trained on a set of {before} images, here are {now}: the order of "
                "images would change; give data.root the same images, or start in another run.dir with "
                f"run.init_from={checkpoint.path}"
            )
        tensors = checkpoint.tensors
        learner.load(tensors["student"], tensors.get("target"), tensors, step)
        self.position = checkpoint.position
        if self.world.is_main:
            self.metrics.cut_after(step)
        self.console.say(f"Resuming at step {step} of {self.schedule.steps} from {checkpoint.path}")

    def save(self, learner: Learner) -> bool:
        """Write a checkpoint of the present position; False, with a warning, if that failed.

        Raises:
            NonFinite: the weights are not finite: such a checkpoint would be of no use.
        """
        if self.world.worst(int(not learner.is_finite())):
            raise NonFinite(f"the weights are not finite after step {self.position.step}. {self.last_good()}")
        tensors = learner.gather()
        saved = True
        if self.world.is_main:
            try:
                write_checkpoint(
                    self.folder.checkpoints, self.position, self.config.to_dict(), tensors, versions()
                )
                keep_newest(self.folder.checkpoints, self.config.run.keep_last)
            except OSError as error:
                saved = False
                self.console.warn(f"checkpoint not written: {error}. {self.last_good()} Training goes on.")
        return not self.world.worst(int(not saved))

    def last_good(self) -> str:
        """A sentence that points to the newest checkpoint."""
        found, _ = newest_good(self.folder.checkpoints)
        return f"The last good checkpoint is {found}." if found else "There is no checkpoint yet."

    def advance(self, outs: list[Step], batch: Batch) -> None:
        """Note one optimizer step, done on micro-batches like `batch`."""
        self.recorder.add(self.position.step, outs, batch.masks)
        step = self.position.step + 1
        images_seen = step * self.config.optim.global_batch
        self.position = replace(self.position, step=step, images_seen=images_seen)

    def log(self, learner: Learner, rates: Rates) -> None:
        """Read what the last steps recorded, write a row of metrics and show where the run is.

        Raises:
            NonFinite: a loss was not; the message names the step and its images.
        """
        interval = self.recorder.read()
        if interval.bad_step is not None:
            raise NonFinite(self._explain(interval.bad_step))
        lap = self.clock.lap()
        self.position = replace(self.position, train_s=self.position.train_s + lap.train_s)
        row: dict[str, float | int | str] = {
            "step": self.position.step,
            "epoch": self.position.images_seen / self.position.dataset_images,
            "images": self.position.images_seen,
            "loss": interval.loss,
            "lr": rates.lr,
            "weight_decay": rates.weight_decay,
            "grad_norm": float(learner.grad_norm),
            "images_per_second": interval.steps * self.config.optim.global_batch / lap.train_s,
            "data_wait_fraction": lap.wait_s / lap.train_s,
            "context_tokens": interval.context_tokens,
            "target_tokens": interval.target_tokens,
            "target_std": interval.signs.target_std,
            "between_image_std": interval.signs.between_image_std,
            "token_rankme": interval.signs.rankme,
            "prediction_std": interval.signs.prediction_std,
            "prediction_rankme": interval.prediction_rankme,
            "elapsed_s": self.position.train_s,
        }
        if learner.target is not None:
            row["momentum"] = rates.momentum
        if not self.world.is_main:
            return
        self._write(row)
        self._watch(interval.signs)
        self.console.show_progress(self._progress(row))

    def judge_now(self, learner: Learner) -> None:
        """Probe on a part of the labelled images."""
        if self.judge is None or not self.world.is_main:
            return
        verdict = self.judge.encoder("so far", learner.judged_encoder, quick=True)
        self._write({"step": self.position.step, "images": self.position.images_seen} | verdict.as_metrics())
        self.console.show_verdict(self.position.step, verdict)

    def conclude(self, learner: Learner) -> None:
        """The last judgement, beside the baselines, and a picture of the features."""
        if not self.world.is_main:
            return
        verdicts: list[Verdict] = []
        if self.judge is not None:
            if learner.target is None:
                verdicts = [self.judge.encoder("trained encoder", learner.judged_encoder)]
            else:
                verdicts = [
                    self.judge.encoder("trained target encoder", learner.judged_encoder),
                    self.judge.encoder("trained context encoder", learner.model.encoder),
                ]
            self._write(
                {"step": self.position.step, "images": self.position.images_seen} | verdicts[0].as_metrics()
            )
        names = {verdict.name for verdict in verdicts}
        kept = [row for row in self.summary.get("probe", []) if row["name"] not in names]
        self.summary |= self._description()
        self.summary["probe"] = kept + [verdict.as_row() for verdict in verdicts]
        self._snapshot(learner.judged_encoder)
        self.folder.write_summary(self.summary)
        if verdicts:
            self.console.show_table(self.summary["probe"])

    def _write(self, row: dict[str, float | int | str]) -> None:
        failure = self.metrics.append(row)
        if failure is not None:
            self.console.warn(failure)

    def _watch(self, signs: CollapseSigns) -> None:
        """Warn of collapse when it begins to show, not at every line after."""
        start = self.summary.get("signs_at_start")
        if start is None:
            self.summary["signs_at_start"] = asdict(signs)
            self.folder.write_summary(self.summary)
            return
        warning = collapse_warning(signs, CollapseSigns(**start))
        if warning is not None and not self._collapsing:
            self.console.warn(f"step {self.position.step}: {warning}")
        self._collapsing = warning is not None

    def _explain(self, step: int) -> str:
        _, index = self.order.batch(step)
        named = ", ".join(self.images.train.path(i) for i in index[:4].tolist())
        more = f" and {len(index) - 4} more" if len(index) > 4 else ""
        return (
            f"the loss is not finite at step {step}, on the images {named}{more}. {self.last_good()} "
            "A lower optim.lr, a longer warm-up or optim.clip_grad may help."
        )

    def _progress(self, row: dict[str, Any]) -> Progress:
        per_image = self.config.optim.global_batch / row["images_per_second"]
        device = self.world.device
        return Progress(
            step=self.position.step,
            steps=self.schedule.steps,
            loss=row["loss"],
            images_per_second=row["images_per_second"],
            data_wait_fraction=row["data_wait_fraction"],
            grad_norm=row["grad_norm"],
            momentum=row.get("momentum"),
            target_std=row["target_std"],
            token_rankme=row["token_rankme"],
            time_left_s=(self.schedule.steps - self.position.step) * per_image,
            memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        )

    def _description(self) -> dict[str, Any]:
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {
            "name": self.config.run.name,
            "objective": self.config.objective.name,
            "steps": self.position.step,
            "images": self.position.images_seen,
            "train_s": self.position.train_s,
            "precision": self.config.optim.precision,
            "device": f"{self.world.size} x {name}",
            "versions": dict(versions()),
            "probe_note": self.images.note,
        }

    @torch.no_grad()
    def _snapshot(self, encoder: VisionTransformer) -> None:
        """Features and masks of the same few images, spread over the set."""
        shown = self.images.queries or self.images.train
        index = torch.arange(SNAPSHOT_IMAGES) * len(shown) // SNAPSHOT_IMAGES
        views = read_views(shown, index.tolist(), self.config.data.image_size)
        features = encoder(views.pixels.to(self.world.device))[:, int(encoder.shape.class_token) :]
        masks = self.masks.sample(views.image_index, epoch=0, step=self.position.step)
        self.folder.write_snapshot(self.position.step, encoder.shape.grid, views.pixels, features, masks)
