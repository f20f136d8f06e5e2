"""The rows of metrics.jsonl, sent on to TensorBoard and Weights & Biases beside the run.

A thread of rank 0 does it, so that no step waits for a disk or a server, and what fails there costs the run
one warning. Nothing is read back: metrics.jsonl stays what a run goes by.
"""

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol

from fastjepa.config import Config, ConfigError
from fastjepa.engine.folder import RunFolder, replace_text
from fastjepa.engine.metrics import read_rows

Name = Literal["tensorboard", "wandb"]
Row = Mapping[str, float | int | str]

PATIENCE_S = 20.0  # at the end of a run, for what was not sent yet: schedulers give it 30 to stop

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What rows are sent to; `close` says that none follow."""

    def cut_after(self, step: int) -> None: ...  # rows after it come again
    def send(self, row: Row) -> None: ...
    def close(self) -> None: ...


def check_tracking(names: Sequence[Name]) -> None:
    """Refuse what could not be sent, before anything is written.

    Raises:
        ConfigError: a package is not installed, or nobody is logged in to Weights & Biases.
    """
    for name in names:
        spec = find_spec(name)
        if (
            spec is None or spec.origin is None
        ):  # a folder of that name in the working directory is no package
            raise ConfigError(
                f"tracking with {name} needs that package, which is not installed: "
                "pip install 'fastjepa[tracking]'"
            )
    if "wandb" in names and not _has_wandb_login():
        raise ConfigError(
            "tracking with wandb needs a login: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline and send the run later with `wandb sync`"
        )


def _has_wandb_login() -> bool:
    """Whether there is a key, or none is needed. The server is not asked: it may be away for a while."""
    import wandb

    try:
        if wandb.setup().settings.mode not in (None, "online", "run", "shared"):
            return True
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.Error, ValueError) as error:  # of settings or a key that it does not take
        raise ConfigError(f"tracking with wandb: {error}") from error


class _Sent:
    """What was sent of the newest step: a judgement of it comes as a second row, with some of the same keys.

    The first value of a key stays, since neither tracker takes one back.
    """

    def __init__(self, step: int, keys: Iterable[str]) -> None:
        self.step, self.keys = step, set(keys)

    def new_of(self, row: Row) -> dict[str, float | int | str]:
        """The part of a row that was not sent, with its step; empty if there is none."""
        step = int(row["step"])
        if step > self.step:
            self.step, self.keys = step, set()
        new = {key: row[key] for key in row.keys() - self.keys - {"step"}} if step == self.step else {}
        self.keys |= new.keys()
        return {"step": step} | new if new else {}


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: RunFolder, config: Config, after: int) -> None:
        self._run, self._text = folder, f"```yaml\n{config.to_yaml()}```"
        self._open(after)

    def _open(self, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # It tells readers to drop what an earlier file has of later steps.
        self._writer = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=after + 1)
        self._writer.add_text("config", self._text, after)
        rows = read_rows(self._run.metrics) if self._run.metrics.exists() else []
        self._sent = _Sent(after, {key for row in rows if row["step"] == after for key in row})

    def cut_after(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def send(self, row: Row) -> None:
        for name, value in self._sent.new_of(row).items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, self._sent.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one each time the run goes on.

    Nothing that was sent there can be taken back: of steps that come again only the first rows count.
    """

    def __init__(self, folder: RunFolder, config: Config, after: int) -> None:
        import wandb

        self._path = folder.path / "wandb.json"
        known = _read_json(self._path)
        self._id = str(known.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
        self._sent = _Sent(int(known.get("step", -1)), known.get("keys", ()))
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "fastjepa"),
            name=os.environ.get("WANDB_NAME", config.run.name),
            dir=os.environ.get("WANDB_DIR", str(folder.path)),
            settings=wandb.Settings(
                console="off",  # the run's lines are its own
                # Of host, user, command line, repository and packages nobody asked to be told.
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                host="",
                username="",
                x_save_requirements=False,
            ),
        )
        self._run.config.update(config.to_dict(), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")
        self._remember()

    def cut_after(self, step: int) -> None:
        pass

    def send(self, row: Row) -> None:
        new = self._sent.new_of(row)
        if new:
            self._run.log(new)
            self._remember()

    def _remember(self) -> None:
        known = {"id": self._id, "step": self._sent.step, "keys": sorted(self._sent.keys)}
        replace_text(self._path, json.dumps(known))

    def close(self) -> None:
        self._run.finish()


def _end_wandb_service() -> None:
    """End the process that sends to Weights & Biases: Python would wait 90 s and more for it."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.service import service_token

    # No public function ends it without waiting.
    setup: Any = wandb_setup.singleton()
    connection: Any = getattr(setup, "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if connection is not None and process is not None:
        if connection._cleanup is not None:  # what would speak to it, and wait for it, as Python ends
            connection._cleanup()
        setup._connection = None  # a later run has a process of its own, and is not led to this one
        service_token.clear_service_in_env()
        process.kill()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


OPEN: dict[Name, Callable[[RunFolder, Config, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Tracking:
    """Sends on what it is given, in a thread of its own; does nothing where there is nobody to send to.

    Args:
        names: whom to; none on other ranks than 0.
        folder: of the run.
        config: its snapshot goes along.
    """

    def __init__(self, names: Sequence[Name], folder: RunFolder, config: Config) -> None:
        self._names, self._folder, self._config = tuple(dict.fromkeys(names)), folder, config
        self._queue: SimpleQueue[Row | int | None] = SimpleQueue()
        self._has_given_up = False
        # Not waited for when Python ends: a server that does not answer must not keep the run from ending.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def cut_after(self, step: int) -> None:
        """Begin after `step`, or go back to it: rows after it come, or come again."""
        if not self._names:
            return
        self._queue.put(step)
        if not self._thread.is_alive():
            self._thread.start()

    def send(self, row: Row) -> None:
        """A row of metrics.jsonl, none of whose values are infinite."""
        if self._names:
            self._queue.put(dict(row))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See the rest sent, for PATIENCE_S at most, and not if someone will not wait."""
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        waits = kind is None or not issubclass(kind, KeyboardInterrupt)
        if waits:
            self._thread.join(PATIENCE_S)
        if not self._thread.is_alive():
            return
        if waits:
            self._warn(" and ".join(self._names), f"not all was sent within {PATIENCE_S:g} s")
        self._has_given_up = True
        if "wandb" in self._names:
            _end_wandb_service()

    def _work(self) -> None:
        begin = self._queue.get()
        assert isinstance(begin, int)
        open_ones: dict[Name, Tracker] = {}
        for name in self._names:
            with _Failing(self, name):
                open_ones[name] = OPEN[name](self._folder, self._config, begin)
        while (message := self._queue.get()) is not None:
            for name, tracker in list(open_ones.items()):
                with _Failing(self, name) as failing:
                    _pass_on(tracker, message)
                if failing.failed:
                    del open_ones[name]
        for name, tracker in open_ones.items():
            with _Failing(self, name):
                tracker.close()

    def _warn(self, name: str, why: object) -> None:
        if self._has_given_up:  # and said so
            return
        later = " or ".join(
            f"`fastjepa track {self._folder.path} --to {n}`" for n in self._names if n in name
        )
        _log.warning("tracking with %s failed: %s; training goes on, and %s sends it later", name, why, later)


class _Failing:
    """What is within may fail: one warning, and nothing more of that tracker."""

    def __init__(self, tracking: Tracking, name: Name) -> None:
        self._tracking, self._name, self.failed = tracking, name, False

    def __enter__(self) -> "_Failing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.failed = isinstance(error, Exception)
        if self.failed:
            self._tracking._warn(self._name, f"{type(error).__name__}: {error}")
        return self.failed


def _pass_on(tracker: Tracker, message: Row | int) -> None:
    if isinstance(message, int):
        tracker.cut_after(message)
    else:
        tracker.send(message)


def send_rows(name: Name, folder: RunFolder, config: Config, rows: Iterable[Row]) -> int:
    """Send all rows of a run again, in this thread; how many there were.

    What TensorBoard had of them is replaced; Weights & Biases gets those that it had not.
    """
    tracker = OPEN[name](folder, config, 0)
    count = 0
    try:
        for row in rows:
            tracker.send(row)
            count += 1
    finally:
        tracker.close()
    return count
