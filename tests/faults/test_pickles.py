"""A pickle can run anything when it is opened, so none is, wherever someone puts one."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.faults.evidence import RUN, TIMEOUT_S, Watched
from tests.faults.table import Row

if TYPE_CHECKING:
    from tests.conftest import Trainer


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_it_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def plant(file: Path, content: bytes) -> None:
    """In a checkpoint that vouches for it: its manifest has the new size and hash."""
    manifest = file.parent / "manifest.json"
    said = manifest.read_text()
    old = json.loads(said).get(file.name, {})
    file.write_bytes(content)
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(json.loads(said) | {file.name: old | new}))


def test_refused_and_not_executed(
    trainer_at: "Callable[[Path], Trainer]",
    tmp_path: Path,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
) -> None:
    row = table(
        "a malicious pickle: as a checkpoint file, run.init_from or --config", "refused, not executed"
    )
    trace = tmp_path / "trace"
    plain = pickle.dumps(Malicious(trace))
    zipped = tmp_path / "zipped.pth.tar"
    torch.save({"encoder": Malicious(trace), "target_encoder": {}, "predictor": {}}, zipped)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(plain)
    tagged = tmp_path / "tagged.yaml"
    tagged.write_text(
        f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trace}']]"
    )

    checkpoint = tmp_path / "elsewhere"
    reference = uninterrupted(*RUN)
    newest = reference.checkpoints / f"step_{reference.step:08d}"
    shutil.copytree(newest, checkpoint)
    plant(checkpoint / "student.safetensors", plain)

    starts: dict[str, tuple[str, ...]] = {
        "torch zip": (f"run.init_from={zipped}",),
        "bare pickle": (f"run.init_from={bare}",),
        "checkpoint": (f"run.init_from={checkpoint}",),
        "config": ("--config", str(bare)),
        "yaml tag": ("--config", str(tagged)),
    }
    for name in ("student.safetensors", "target.safetensors", "exp_avg.safetensors", "state.json"):
        starts[f"resume {name}"] = RUN
    processes = []
    for number, (case, arguments) in enumerate(starts.items()):
        home = tmp_path / str(number)
        home.mkdir()
        trainer = trainer_at(home)
        if case.startswith("resume "):
            (trainer.run / "checkpoints").mkdir(parents=True)
            shutil.copytree(newest, trainer.run / "checkpoints" / newest.name)
            plant(trainer.run / "checkpoints" / newest.name / case.removeprefix("resume "), plain)
        processes.append((case, trainer, trainer.start(*arguments)))
        if len(processes) % 3 == 0:  # not all at once
            processes[-1][2].wait(timeout=TIMEOUT_S)
    for case, trainer, process in processes:
        refused = trainer.finish(process, timeout_s=TIMEOUT_S)
        assert refused.code == 1, (case, refused)
        assert len(refused.errors) == 1, (case, refused)
        assert "Traceback" not in refused.err, (case, refused)
        assert trainer.rows == [], case
        row.times += 1
    assert not trace.exists()
