"""Where exported weights come from: what their checkpoint and its run say, for a model card."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import fastjepa
from fastjepa.config import Config, parse_config
from fastjepa.engine.checkpoints.checkpoint import STATE, Position, load_checkpoint, read_state
from fastjepa.report.load import Probe, load_run


@dataclass(frozen=True)
class Provenance:
    """Attributes:
    source: the checkpoint and its run, by their names alone.
    config: of the run; None of a published file, as are the next two.
    position: how far it had come.
    versions: of what wrote the checkpoint.
    probes: what the run's probes say of the checkpoint; none where it was not judged at that step.
    probe_note: how they judge.
    """

    source: str
    config: Config | None = None
    position: Position | None = None
    versions: dict[str, str] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    probe_note: str = ""


def provenance_of(checkpoint: Path) -> Provenance:
    """What is known of a checkpoint directory, or of a published file.

    Raises:
        CheckpointError, ConfigError: it cannot be read.
    """
    if checkpoint.is_file():
        return Provenance(checkpoint.name)
    opened = load_checkpoint(checkpoint)
    config, step = parse_config(opened.config), opened.position.step
    versions = read_state(checkpoint)["versions"]
    run = checkpoint.resolve().parent.parent
    # A checkpoint may have been copied out of its run; what lies around it then is nobody's.
    if checkpoint.resolve().parent.name != "checkpoints" or not (checkpoint / STATE).exists():
        return Provenance(checkpoint.name, config, opened.position, versions)
    found, source = load_run(run), f"{checkpoint.name} of the run {config.run.name}"
    if found.summary.steps == step and found.summary.probes:
        probes, note = found.summary.probes, found.summary.probe_note
    else:
        rows = [row for row in found.metrics if row["step"] == step and "linear_top1" in row]
        measured = ({key: row.get(key) for key in ("knn_top1", "linear_top1", "rankme")} for row in rows)
        whose = "the encoder" if config.objective.name == "mae" else "the target encoder"
        probes = tuple(Probe(f"{whose} at step {step}", **values) for values in measured)
        # The summary's note is of the judgement at the end, of more images.
        judged = config.probe
        note = f"judged in passing, on at most {judged.queries:,} images, by at most {judged.bank:,} others"
    return Provenance(source, config, opened.position, versions, probes, note)


def version_of_code() -> str:
    """Of this fastjepa, and the commit where it runs from a git checkout."""
    root = Path(fastjepa.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return fastjepa.__version__
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or one that does not want to
        return fastjepa.__version__
    return f"{fastjepa.__version__}, commit {said}"
