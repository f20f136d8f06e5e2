"""The folder of a run: config.yaml, metrics.jsonl, checkpoints/ and report/."""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.config import Config, ConfigError, differences, parse_config
from fastjepa.engine.checkpoints.checkpoint import list_checkpoints
from fastjepa.engine.checkpoints.write import make_folder, sync
from fastjepa.engine.disk import remedy
from fastjepa.masks import Masks

Json = dict[str, Any]
_log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # with whom holds the folder: pruning does for an instant, and so does a run that ends
_LOOK_S = 0.1
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # what drives without them answer


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and its small files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "report" / "summary.json"

    @property
    def snapshots(self) -> Path:
        return self.path / "report" / "snapshots"

    def open(self, config: Config, patience_s: float = _PATIENCE_S) -> TextIO:
        """Make the folder, or take it up again.

        The configuration of a run that is there already stays until `write_config`: it may yet be refused.

        Args:
            config: of the run.
            patience_s: how long to wait for a process that holds it.

        Returns:
            A file whose lock keeps other processes out while it is open, on a drive that has locks.

        Raises:
            ConfigError: it cannot be written, is in use, or holds a run of another configuration.
        """
        try:
            make_folder(self.path)
            if config.run.resume == "never":
                self._check_nothing_saved()
            if self.config.exists() and config.run.resume != "force":
                self._check_same_run(config)
            lock = (self.path / ".lock").open("a")
            self._hold(lock, patience_s)
            if not self.config.exists() and not list_checkpoints(self.checkpoints):
                replace_text(self.config, config.to_yaml())
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is training in {self.path}: wait for it, end it, or choose another run.dir"
            ) from error
        except OSError as error:
            raise self._cannot_write(error) from error
        return lock

    def write_config(self, config: Config) -> None:
        """From now on these are the settings of the run. Nothing is written where the file says so already.

        Raises:
            ConfigError: it cannot be written.
        """
        text = config.to_yaml()
        with suppress(OSError):
            if self.config.read_bytes() == text.encode():
                return  # so that a run may start again where there is no room for a second copy
        try:
            self.read_config()
        except ConfigError as error:
            if self.config.exists():
                _log.warning("%s; it is written anew", error)
        try:
            replace_text(self.config, text)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write to the run folder {self.path}: {error.strerror}; {remedy(error)}")

    def _hold(self, lock: TextIO, patience_s: float) -> None:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _log.warning(
                    "%s is on a drive without file locks (%s): two runs in it cannot be told apart, so see "
                    "that no other writes there",
                    self.path,
                    error.strerror,
                )
                return
            time.sleep(_LOOK_S)

    def read_config(self) -> Config:
        """The settings of the run.

        Raises:
            ConfigError: there are none, or they cannot be read.
        """
        try:
            return parse_config(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.config} cannot be read: {reason}") from error

    def _check_same_run(self, config: Config) -> None:
        try:
            before = self.read_config()
        except ConfigError as error:
            if list_checkpoints(self.checkpoints):  # each has its settings, and is held against them
                return
            raise ConfigError(f"{error}; delete it if it is of no use, or choose another run.dir") from error
        changed = differences(before.results_part(), config.results_part())
        if changed:
            listing = "".join(f"\n  {line}" for line in changed)
            raise ConfigError(
                f"{self.path} holds a run with other settings (there -> here):{listing}\n"
                "Give this run a folder of its own (run.dir=…), or use those settings to resume that one; "
                "run.resume=force resumes it with these."
            )

    def _check_nothing_saved(self) -> None:
        saved = list_checkpoints(self.checkpoints)
        if saved:
            raise ConfigError(
                f"{self.path} holds a run up to {saved[0].name}, and run.resume is never: choose another "
                "run.dir, or run.resume=auto to go on with that one"
            )

    def read_summary(self) -> Json:
        """What `write_summary` wrote last; empty if nothing, or if it cannot be read."""
        try:
            found = json.loads(self.summary.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_summary(self, summary: Json) -> None:
        self.summary.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.summary, json.dumps(summary, indent=1))

    def write_snapshot(
        self,
        step: int,
        grid: tuple[int, int],
        images: Tensor,
        features: Tensor,
        masks: Masks,
        shown: Mapping[str, Tensor] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Features and masks of the same few images, for the report.

        Args:
            grid: patches per column and row.
            images: uint8 [n, C, H, W].
            features: [n, N, D].
            masks: as sampled for these images.
            shown: what else there is to show, as `Showing.tensors` gives it.
            class_names: what its labels are called; None without.
        """
        self.snapshots.mkdir(parents=True, exist_ok=True)
        tensors = {"images": images, "features": features.half(), "targets": masks.targets}
        if masks.cu_seqlens is None:
            tensors["context"] = masks.context
        else:
            tensors |= {"context_flat": masks.context, "cu_seqlens": masks.cu_seqlens}
        tensors |= shown or {}
        metadata = {"grid": f"{grid[0]},{grid[1]}", "step": str(step)}
        if class_names is not None:
            metadata["class_names"] = json.dumps(list(class_names))
        file = self.snapshots / f"step_{step:08d}.safetensors"
        partial = file.with_suffix(".tmp")
        try:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                partial,
                metadata=metadata,
            )
        except SafetensorError as error:  # how safetensors reports a full disk
            partial.unlink(missing_ok=True)
            raise OSError(f"writing {file}: {error}") from error
        os.replace(partial, file)


def folder_of(config: Config) -> RunFolder:
    """Where the run of a configuration goes; nothing is made yet."""
    return RunFolder(Path(config.run.dir.replace("{name}", config.run.name)))


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, whenever the machine crashes."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def versions() -> Mapping[str, str]:
    """What a result depends on."""
    from fastjepa import __version__

    found = {"fastjepa": __version__, "torch": torch.__version__}
    try:
        return found | {"deepspeed": metadata.version("deepspeed")}
    except metadata.PackageNotFoundError:  # one device needs none
        return found
