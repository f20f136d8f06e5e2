"""Going back to before a loss spike, and on from there with other data: what `run.on_spike` asks for.

Step s then reads what step s + `passed_over` would have read: images, masks and crops, all still functions of
integers. What was seen between the checkpoint and the log line that showed the spike is left out, once; the
schedule stays that of the step. So did PaLM (arXiv:2204.02311, section 5.1), where the same batches made no
spike when they came to other weights.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastjepa.engine.checkpoints.checkpoint import (
    CheckpointError,
    is_of_other_version,
    list_checkpoints,
    load_checkpoint,
    step_of,
)
from fastjepa.engine.checkpoints.keep import put_away, set_aside
from fastjepa.engine.checkpoints.verify import verify_checkpoint
from fastjepa.engine.learner import Learner
from fastjepa.engine.processes.activity import Doing
from fastjepa.engine.run import Run
from fastjepa.engine.spikes import IN_A_ROW, Spike, may_roll_back


def heed_spike(run: Run, learner: Learner, spike: Spike) -> bool:
    """Say that there is a spike, and go back if that is wished; whether it has (every rank must call this).

    Raises:
        CheckpointError: the checkpoint to go back to cannot be read after all.
    """
    found = _where_to(run, spike)
    step = None if found is None else step_of(found)
    if found is not None and step is not None:
        seen = run.position.step - step
        run.console.warn(f"{spike}: going back to step {step}, and on without the data of {seen} steps")
        _go_back(run, learner, found, spike)
    if run.world.is_main:
        run.judgement.write(
            {
                "step": run.position.step,
                "event": "spike" if step is None else "rollback",
                "spike_step": spike.step,
                "spike_loss": spike.loss,
                "usual_loss": spike.usual,
                "passed_over": run.position.passed_over,
            }
        )
    return step is not None


def _where_to(run: Run, spike: Spike) -> Path | None:
    """The checkpoint to go back to, alike on all ranks; None, with a warning, where the run goes on."""
    if run.config.run.on_spike != "rollback":
        run.console.warn(f"{spike}. {run.last_good()}")
        return None
    if not may_roll_back(spike, run.position.rolled_back, run.config.run.save_every):
        run.console.warn(
            f"{spike}, so soon after the one at step {run.position.rolled_back} that it is not for the data: "
            "going on. A lower optim.lr, a longer warm-up or optim.clip_grad may help."
        )
        return None
    with run.world.activity.during(Doing.SAVING):  # or reading, which may take as long
        run.hear_of_save()
        found = run.world.on_main(lambda: _newest_before(run, spike))
        (name, *_) = run.world.gather(None if found is None else found.name)
    if name is None:
        run.console.warn(f"{spike}, and there is no good checkpoint from before it to go back to: going on")
        return None
    return run.folder.checkpoints / name


def _newest_before(run: Run, spike: Spike) -> Path | None:
    """The last steps before a spike may have led to it: they are not gone back into."""
    for path in list_checkpoints(run.folder.checkpoints):
        if step_of(path) < spike.step - IN_A_ROW:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                run.console.warn(f"{error}; taking the one before it")
            else:
                return path
    return None


def _go_back(run: Run, learner: Learner, path: Path, spike: Spike) -> None:
    with run.world.activity.during(Doing.SAVING):  # or reading
        checkpoint = load_checkpoint(path)
        there, now = checkpoint.position, run.position
        tensors = checkpoint.tensors
        learner.load(tensors["student"], tensors.get("target"), tensors, there.updates)
    run.losses.go_back(there)
    run.position = replace(
        now.of_here(there),
        train_s=now.train_s,
        passed_over=now.passed_over + now.step - there.step,
        rolled_back=spike.step,
    )
    run.went_back(path, there.step)
    run.cut_metrics()
    run.world.on_main(lambda: _discard_after(run, there.step))


def _discard_after(run: Run, step: int) -> None:
    """The run that made them is no more, and one that resumes must not take them."""
    for path in list_checkpoints(run.folder.checkpoints):
        if step_of(path) > step:
            run.judgement.disk.attempt(path, partial(_remove, path), "it must not be resumed from")


def _remove(path: Path) -> None:
    if is_of_other_version(path):
        put_away(path)
    else:
        shutil.rmtree(set_aside(path), ignore_errors=True)
