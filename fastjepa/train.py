"""Pretrain an encoder: the story of one run, top to bottom.

    python fastjepa/train.py --config configs/fashion_mnist.yaml [section.key=value …]
    deepspeed fastjepa/train.py --config configs/vit_base_16.yaml data.root=/images
    torchrun --nproc-per-node 8 fastjepa/train.py --config configs/vit_base_16.yaml data.root=/images

The same command again resumes from the newest good checkpoint.
"""

import argparse
import atexit
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from fastjepa.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before all that takes long

from fastjepa.config import Config, ConfigError, load_config
from fastjepa.data.loader import Batch, make_loader
from fastjepa.data.shards.store import StoreError
from fastjepa.data.unreadable import TooManyUnreadable
from fastjepa.data.workers import NotWanted, WorkersDied
from fastjepa.engine.build import (
    build_augmentation,
    build_masks,
    build_model,
    build_order,
    build_reading,
    build_schedule,
)
from fastjepa.engine.checkpoints.checkpoint import CheckpointError, list_checkpoints
from fastjepa.engine.clock import StepClock
from fastjepa.engine.console import RunConsole
from fastjepa.engine.folder import folder_of
from fastjepa.engine.images import open_images
from fastjepa.engine.launch import deepspeed_config, preferred_kernels
from fastjepa.engine.learner import Learner, how_it_runs, start_learner
from fastjepa.engine.output import settle, tell
from fastjepa.engine.prefetch import in_steps, on_device
from fastjepa.engine.processes.activity import Doing
from fastjepa.engine.processes.shared import check_shared
from fastjepa.engine.processes.stopping import (
    Call,
    NonFinite,
    PeerFailed,
    StoppedEarly,
    StopRequest,
    mark_stopped,
)
from fastjepa.engine.processes.world import World, joined
from fastjepa.engine.rollback import heed_spike
from fastjepa.engine.run import Run
from fastjepa.engine.schedules import is_due
from fastjepa.engine.speed import check_speed
from fastjepa.engine.tracking import Tracking, check_tracking
from fastjepa.interop import load_initial_weights

# Errors that the person at the keyboard can do something about: the message is all there is to say.
TOLD = (
    ConfigError,
    CheckpointError,
    TooManyUnreadable,
    WorkersDied,
    StoreError,
    NonFinite,
    PeerFailed,
    TimeoutError,
)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run from the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog, description="Pretrain an encoder with I-JEPA, or with MAE for comparison."
    )
    parser.add_argument("--config", help="a YAML file, see configs/")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.overrides and not options.print_config:
        parser.error("say what to train: --config configs/fashion_mnist.yaml, or another recipe of configs/")
    try:
        config = load_config(options.config, options.overrides)
        stop = StopRequest()
        if options.print_config:
            print(config.to_yaml(), end="")
            return 0
        atexit.register(settle)
        with joined(config.speed.device, config.run, stop.remember) as world:
            return pretrain(config, world, stop)
    except TOLD as error:
        tell(f"error: {error}", sys.stderr)
        return 1
    except StoppedEarly:
        tell("Stopped before it began; the same command starts it.", sys.stdout)
        mark_stopped(folder_of(config).path, "Stopped before it began")
        return 0
    except KeyboardInterrupt:  # while starting, or the second one
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would hide the exit status
        tell("interrupted", sys.stderr)
        return INTERRUPTED


def pretrain(config: Config, world: World, stop: StopRequest) -> int:
    """One run, or the rest of one; the exit status."""
    clock = StepClock()
    # Whatever does not fit together is refused here, before anything is written.
    images, masks, augmentation = open_images(config), build_masks(config), build_augmentation(config)
    order = build_order(config, len(images.train), images.shard_ends)
    build_reading(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    check_speed(config, world)
    deepspeed_config(config, world.size)
    world.on_main(lambda: check_tracking(config.run.track))
    model, folder = build_model(config), folder_of(config)
    if config.run.init_from is not None and not list_checkpoints(folder.checkpoints):
        load_initial_weights(model, config.run.init_from)
    _lock = world.on_main(lambda: folder.open(config))  # held until the process ends
    check_shared(world, folder.path)
    if world.is_main:
        mark_stopped(folder.path, None)

    with (
        RunConsole(world.is_main, title=config.run.name) as console,
        Tracking(config.run.track if world.is_main else (), folder, config) as tracking,
        preferred_kernels(config),
    ):
        run = Run(
            config,
            world,
            folder,
            console,
            images,
            masks,
            augmentation,
            order,
            schedule,
            stop,
            tracking,
            clock,
        )
        run.judge_baselines(model)
        learner = start_learner(model, config, world)
        console.say(how_it_runs(learner, config, world))
        run.resume(learner)
        with run:  # leaves no checkpoint half written
            fit(run, learner)
        is_trained = run.position.step == schedule.steps
        if not is_trained or not run.conclude(learner):
            assert world.worst(int(stop.is_made())), "it stopped without having been told to"
            before = "before it was judged, " if is_trained else ""
            where = f"Stopped {before}at step {run.position.step} of {schedule.steps}"
            console.say(f"{where}; the same command resumes.")
            if stop.signal == signal.SIGINT:
                return INTERRUPTED
            if world.is_main:
                mark_stopped(folder.path, where)
            return 0
        if world.is_main and config.run.report:
            from fastjepa.report import write_report  # loads matplotlib, which no other rank or start needs

            try:
                console.say(f"Report: {write_report(folder.path)}")
            except OSError as error:
                console.warn(f"no report: {error}; `fastjepa report {folder.path}` writes it again")
    return 0


def fit(run: Run, learner: Learner) -> None:
    """Train from the run's position to its last step, a signal or a failing drive; leave a checkpoint."""
    run.judge_if_due(
        learner, max(run.position.step - 1, 0)
    )  # it may have been killed between saving and judging
    run.note_times(starting=True)
    call: int = Call.GO_ON
    failure: Exception | None = None
    while call == Call.GO_ON and run.position.step < run.schedule.steps:
        with closing(batches_of(run)) as batches:
            call, failure = train_on(run, learner, batches)
    run.hear_last(learner)
    with run.clock.paused("saving"), run.world.activity.during(Doing.SAVING):
        is_saved = run.save_last(learner)
    if not is_saved:
        raise CheckpointError(f"the last checkpoint could not be written to {run.folder.checkpoints}")
    if call == Call.GIVE_UP:
        raise failure or PeerFailed("another rank stopped; its message says why")


def train_on(
    run: Run, learner: Learner, batches: Generator[Batch, None, None]
) -> tuple[int, Exception | None]:
    """To the last step, or to where it cannot go on, or until it has gone back, from where other data follow.

    Returns:
        What the ranks agree to do, and what failed on this one.
    """
    config, world = run.config, run.world
    steps = on_device(in_steps(batches, config.speed.accumulation), world.device, config.speed.prefetch)
    heeded = run.position.step
    for step in range(run.position.step, run.schedule.steps):
        world.activity.begin(Doing.COMPUTING, step, run.saved_step)
        with run.clock.waiting(), world.activity.during(Doing.LOADING):
            micro_batches, failure = fetch(steps)
        call = world.worst(run.stop.call if failure is None else Call.GIVE_UP)
        if call != Call.GO_ON:
            return call, failure

        rates = run.schedule.at(step)
        loss, last = learner.step(micro_batches, rates)
        run.advance(learner, loss, last, micro_batches)

        done = step + 1
        # The first line is what later signs of collapse are held against.
        if done == 1 or done % config.run.log_every == 0 or done == run.schedule.steps:
            spike = run.log(learner, rates)
            if spike is not None and heed_spike(run, learner, spike):
                break
        if learner.skipped_in_a_row:  # perhaps for what the weights are: kept and judged once one is not
            continue
        if is_due(config.run.save_every, heeded, done):
            with run.clock.paused("saving"), world.activity.during(Doing.SAVING):
                run.save(learner)
        run.judge_if_due(learner, heeded)
        heeded = done
    return Call.GO_ON, None


def batches_of(run: Run) -> Generator[Batch, None, None]:
    """A rank's micro-batches from the run's position on."""
    config, world, position = run.config, run.world, run.position
    return make_loader(
        run.images.train,
        run.masks,
        run.order,
        size=config.data.image_size,
        augmentation=run.augmentation,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.speed.accumulation,
        first_step=position.step + position.passed_over,
        last_step=run.schedule.steps + position.passed_over,
        workers=config.speed.workers,
        worker_timeout_s=config.speed.worker_timeout_s,
        should_stop=run.stop.is_made,
        pin_memory=world.device.type == "cuda",
        reading=build_reading(config),
    )


def fetch(steps: Iterator[list[Batch]]) -> tuple[list[Batch], Exception | None]:
    """The micro-batches of a step, or why there are none: the other ranks must hear of it first."""
    try:
        return next(steps), None
    except NotWanted:
        return [], None
    except Exception as error:  # whatever it is; raised again once all ranks have saved
        return [], error


if __name__ == "__main__":
    sys.exit(main())
