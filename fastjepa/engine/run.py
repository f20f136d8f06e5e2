"""Everything around the training loop of one run: its folder, checkpoints and log lines."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.data.loader import Batch
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.workers import NotWanted
from fastjepa.engine.checkpoints.checkpoint import (
    CheckpointError,
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    state_of,
)
from fastjepa.engine.checkpoints.keep import Keep
from fastjepa.engine.checkpoints.resume import check_continues, check_fits
from fastjepa.engine.checkpoints.saver import Job, Saver, start_saver
from fastjepa.engine.checkpoints.verify import newest_good
from fastjepa.engine.clock import StepClock
from fastjepa.engine.console import Progress, RunConsole
from fastjepa.engine.folder import RunFolder, versions
from fastjepa.engine.images import RunImages
from fastjepa.engine.judgement import Judgement
from fastjepa.engine.learner import Encoders, Learner
from fastjepa.engine.losses import LossWatch
from fastjepa.engine.metrics import MetricsFile
from fastjepa.engine.processes.activity import Doing
from fastjepa.engine.processes.stopping import NonFinite, StopRequest
from fastjepa.engine.processes.world import World
from fastjepa.engine.recorder import Recorder
from fastjepa.engine.schedules import Rates, Schedule, is_due
from fastjepa.engine.snapshots import cut_after
from fastjepa.engine.spikes import Spike, seen_within
from fastjepa.engine.tracking import Tracking
from fastjepa.masks import MaskSampler
from fastjepa.objectives import JEPA, MAE, Step


@dataclass
class Run:
    """What one run writes and says. Methods are called on every rank; rank 0 writes.

    Attributes:
        stop: whether it has been told to stop, which breaks off judgements and waits for data.
        tracking: sends rows on, from rank 0.
        position: how far it is.
        unreadable: paths of the training images that this rank had to skip.
        saved_step: of the newest checkpoint that was written or resumed from; 0 before there is one.
    """

    config: Config
    world: World
    folder: RunFolder
    console: RunConsole
    images: RunImages
    masks: MaskSampler
    augmentation: Augmentation
    order: GlobalOrder
    schedule: Schedule
    stop: StopRequest
    tracking: Tracking
    clock: StepClock = field(default_factory=StepClock)
    unreadable: set[str] = field(default_factory=set)
    saved_step: int = 0
    _saver: Saver | None = field(default=None, repr=False)
    _saving_step: int = 0
    _saved: Path | None = None  # that checkpoint, which need not bear the name that it would get here
    _damaged: frozenset[Path] = frozenset()  # checkpoints that were found to be, on rank 0

    def __post_init__(self) -> None:
        micro_batch = self.config.optim.global_batch // (self.world.size * self.config.speed.accumulation)
        checksum = self.images.checksum()
        self.position = Position(0, 0, 0.0, len(self.images.train), micro_batch, dataset_checksum=checksum)
        self.recorder = Recorder(self.world)
        self.losses = LossWatch(
            self.config,
            self.world,
            self.console,
            self.images.train,
            self.order,
            self.recorder,
            self.last_good,
        )
        self.metrics = MetricsFile(self.folder.metrics)
        self.judgement = Judgement(
            self.config,
            self.world,
            self.folder,
            self.console,
            self.images,
            self.masks,
            self.metrics,
            self.stop.is_made,
            self.tracking,
            self.schedule.steps,
        )

    def judge_baselines(self, model: JEPA | MAE) -> None:
        """Judge what training starts from, and raw pixels, and picture the features: once in a run.

        Args:
            model: at the start of the run, whose weights may come from `run.init_from`.
        """
        with self.clock.paused("judging"):
            self.world.on_main(lambda: self.judgement.baselines(model, self.position))

    def resume(self, learner: Learner) -> None:
        """Take up the newest good checkpoint of the folder, if there is one, and be ready to save.

        From then on the run is one of these settings, and its config.yaml says so.

        Raises:
            CheckpointError: no checkpoint of several is good, the newest good one is of another run, or the
                host has not the memory that saving takes.
        """
        with self.world.activity.during(Doing.SAVING):  # or reading, which may take as long
            self._take_up(learner)
            self._saver = start_saver(learner.parts(), self.world)
        self.world.on_main(lambda: self.folder.write_config(self.config))
        self.cut_metrics()

    def _take_up(self, learner: Learner) -> None:
        found, damaged = self.world.on_main(self._newest_good) or (None, [])
        for line in damaged:
            self.console.warn(f"{line}; taking the one before it")
        (name, *_) = self.world.gather(None if found is None else found.name)
        if name is not None:
            checkpoint = load_checkpoint(self.folder.checkpoints / name)
            for line in check_continues(checkpoint, self.position, self.config):
                self.console.warn(line)
            check_fits(checkpoint, learner.shapes())
            if checkpoint.position.step > self.schedule.steps:
                raise CheckpointError(
                    f"{checkpoint.path} is of step {checkpoint.position.step}, and this run has "
                    f"{self.schedule.steps}: raise optim.steps or optim.epochs, or start in another run.dir"
                )
            tensors = checkpoint.tensors
            learner.load(tensors["student"], tensors.get("target"), tensors, checkpoint.position.updates)
            self.recorder.earlier = checkpoint.position.losses
            self.position = self.position.of_here(checkpoint.position)
            self.saved_step, self._saved = self.position.step, checkpoint.path
            where = f"step {self.position.step} of {self.schedule.steps}"
            self.console.say(f"Resuming at {where} from {checkpoint.path}")

    def cut_metrics(self) -> None:
        """Drop rows and snapshots after the present position, which come again."""
        path, step = self.metrics.path, self.position.step
        otherwise = f"the rows after step {step} stay until it can be"
        self.world.on_main(
            lambda: self.judgement.disk.attempt(path, lambda: self.metrics.cut_after(step), otherwise)
        )
        self.world.on_main(lambda: cut_after(self.folder.snapshots, step))
        self.tracking.cut_after(step)

    def _newest_good(self) -> tuple[Path | None, list[str]]:
        found, damaged = newest_good(self.folder.checkpoints)
        if damaged and found is None:
            listing = "".join(f"\n  {line}" for line in damaged)
            raise CheckpointError(
                f"no checkpoint in {self.folder.checkpoints} can be used; repair one, or delete them to "
                f"start over:{listing}"
            )
        present = list_checkpoints(self.folder.checkpoints)
        self._damaged = frozenset(present if found is None else present[: present.index(found)])
        return found, damaged

    def went_back(self, checkpoint: Path, step: int) -> None:
        """Note that a checkpoint was taken up again."""
        self.saved_step, self._saved = step, checkpoint

    def save(self, learner: Learner) -> None:
        """Begin a checkpoint of the present position, once the one before is written.

        It is written in the background from a copy on the host. If that fails, a later step warns.

        Raises:
            NonFinite: the weights, or the losses that led to them, are not finite: it would be of no use.
        """
        losses = self.losses.since_log(self.position)
        position = replace(self.position, updates=learner.updates, losses=losses)
        if self.world.worst(int(not learner.is_finite())):
            raise NonFinite(f"the weights are not finite after step {position.step}. {self.last_good()}")
        self.hear_of_save()
        parts, run = learner.parts(), self.config.run
        assert self._saver is not None, "resume before you save"
        stage = learner.zero_stage
        state = state_of(position, self.config.to_dict(), versions(), self.world.size, stage)
        back = seen_within(run.log_every) if run.on_spike == "rollback" else None
        keep = Keep(run.keep_last, run.keep_every, back)
        self._saving_step = position.step
        self._saver.start(parts, Job(self.folder.checkpoints, position.step, state, keep, self._damaged))

    def save_last(self, learner: Learner) -> bool:
        """See the present position on the disk; False, with a warning, if it cannot be written.

        Raises:
            NonFinite: as `save` does.
        """
        if not self._is_saved():
            self.save(learner)
        return self._is_saved()

    def _is_saved(self) -> bool:
        """Whether the present position is on the disk; all ranks agree."""
        self.hear_of_save()
        return not self.world.worst(int(self.saved_step != self.position.step))

    def hear_of_save(self, wait: bool = True) -> None:
        """Note whether the checkpoint under way was written, and warn if not.

        Args:
            wait: for it. Otherwise nothing happens while it is under way.
        """
        if self._saver is None or not self._saving_step or (self._saver.is_busy and not wait):
            return
        step, self._saving_step = self._saving_step, 0
        failure = self._saver.wait()
        if failure is None:
            self.saved_step, self._saved = step, checkpoint_path(self.folder.checkpoints, step)
            self._damaged -= {self._saved}
            self.judgement.disk.works(self.folder.checkpoints)
        elif self.judgement.disk.is_news(self.folder.checkpoints):
            self.console.warn(f"checkpoint not written: step {step}: {failure}. {self._newest()}")

    def last_good(self) -> str:
        """A sentence that points to the newest checkpoint; waits for the one under way."""
        with self.world.activity.during(Doing.SAVING):
            self.hear_of_save()
        return self._newest()

    def _newest(self) -> str:
        if self._saved is not None:
            return f"The last good checkpoint is {self._saved}."
        return "There is no checkpoint yet."

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the checkpoint under way, unless someone will not wait."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.hear_of_save()

    def advance(self, learner: Learner, loss: Tensor, last: Step, micro_batches: list[Batch]) -> None:
        """Note one optimizer step.

        Raises:
            NonFinite: the gradients of the last few steps were not.
        """
        self.recorder.add(loss, last, micro_batches[-1])
        for batch in micro_batches:
            self.unreadable.update(batch.unreadable)
        step = self.position.step + 1
        images_seen = step * self.config.optim.global_batch
        self.position = replace(self.position, step=step, images_seen=images_seen)
        self.hear_of_save(wait=False)
        self._heed_skips(learner, step - learner.lag)

    def hear_last(self, learner: Learner) -> None:
        """After the last step, whose outcome may not be known yet.

        Raises:
            NonFinite: as `advance` does.
        """
        if learner.hear():
            self._heed_skips(learner, self.position.step)

    def _heed_skips(self, learner: Learner, known: int) -> None:
        """`known` is the step whose outcome is."""
        if learner.skipped_in_a_row:
            self.losses.heed_skip(self.position, known, learner.skipped_in_a_row)

    def log(self, learner: Learner, rates: Rates) -> Spike | None:
        """Read what the last steps recorded, write a row of metrics and show where the run is.

        Returns:
            A loss spike that shows now.

        Raises:
            NonFinite: the losses of the last few steps were not; the message names their images.
        """
        losses = self.losses.since_log(self.position)
        finite = [loss for loss in losses if math.isfinite(loss)]
        interval = self.recorder.read(learner.model)
        lap = self.clock.lap()
        self.position = replace(self.position, train_s=self.position.train_s + lap.train_s)
        self.position, spike = self.losses.find_spike(self.position, losses)
        row: dict[str, float | int] = {
            "step": self.position.step,
            "epoch": self.position.images_seen / self.position.dataset_images,
            "images": self.position.images_seen,
            "loss": fmean(finite) if finite else math.nan,
            "lr": rates.lr,
            "weight_decay": rates.weight_decay,
            "grad_norm": float(learner.grad_norm),
            "images_per_second": interval.steps * self.config.optim.global_batch / lap.train_s,
            "data_wait_fraction": lap.wait_s / lap.train_s,
            "judge_s": lap.judge_s,  # since the row before, as the next
            "save_s": lap.save_s,
            "context_tokens": interval.context_tokens,
            "target_tokens": interval.target_tokens,
            "target_std": interval.signs.target_std,
            "between_image_std": interval.signs.between_image_std,
            "token_rankme": interval.signs.token_rankme,
            "prediction_std": interval.signs.prediction_std,
            "prediction_rankme": interval.prediction_rankme,
            "skipped_steps": self.position.step - learner.updates,
            "elapsed_s": self.position.train_s,
        }
        if learner.target is not None:
            row["momentum"] = rates.momentum
        if self.world.is_main:
            self.judgement.write(row)
            self.judgement.watch(interval.signs, self.position)
            self.console.show_progress(self._progress(row))
        return spike

    def judge_if_due(self, learner: Learner, heeded: int) -> None:
        """Probe on a part of the labelled images, once at each multiple of `probe.every_steps`.

        Args:
            learner: at the present position.
            heeded: the step up to which nothing is due any more.

        Raises:
            NonFinite: there is nothing to judge any more.
        """
        if is_due(self.config.probe.every_steps, heeded, self.position.step):
            with self.clock.paused("judging"):
                self.losses.since_log(self.position)
                encoders = learner.encoders()
                self.world.on_main(lambda: self.judgement.so_far(encoders, self.position))

    def note_times(self, *, starting: bool) -> None:
        """Note what this process spent before its first step, or since its last row of metrics."""
        lap = self.clock.lap()
        self.world.on_main(lambda: self.judgement.spend(lap, starting=starting))

    def conclude(self, learner: Learner) -> bool:
        """The last judgement, beside the baselines, and a picture of the features.

        Returns:
            Whether it was made, on all ranks alike; False if rank 0 has been told to stop.
        """
        self.unreadable = set().union(*self.world.gather(sorted(self.unreadable)))
        with self.clock.paused("judging"):
            encoders = learner.encoders()
            is_made = self.world.on_main(lambda: self._conclude(encoders))
        self.note_times(starting=False)
        return not self.world.worst(int(is_made is False))

    def _conclude(self, encoders: Encoders) -> bool:
        try:
            self.judgement.final(encoders, self.position)
        except NotWanted:
            return False
        if self.unreadable:
            count = f"{len(self.unreadable)} of {len(self.images.train)}"
            self.console.say(f"{count} images could not be read and were skipped; they are named above")
        return True

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
            skipped_steps=row["skipped_steps"],
            time_left_s=(self.schedule.steps - self.position.step) * per_image,
            memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        )
