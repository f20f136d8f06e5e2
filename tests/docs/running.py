"""Documented commands, run as `rules` says."""

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

from fastjepa import cli
from fastjepa import train as trainer
from fastjepa.commands import plan
from fastjepa.config import load_config
from tests.conftest import ROOT
from tests.docs import rules
from tests.docs.blocks import Block
from tests.test_makefile import make

Words = Sequence[str]


def write_file(block: Block, folder: Path) -> None:
    """A yaml block as the file that its first line names; it must be a configuration."""
    name = re.match(r"# (\S+\.yaml)\n", block.text)
    assert name, f"{block.place}: a yaml block begins with a comment that names its file"
    (folder / name[1]).write_text(block.text)
    load_config(folder / name[1], needs_data=False)


def run_command(words: Words) -> None:
    """One command, in the current folder."""
    rule = RULES.get(words[0])
    assert rule is not None, f"no rule for {words[0]!r} in tests/docs/running.py"
    rule([*words[1:]])


def _fastjepa(words: Words) -> None:
    command, why = " ".join(["fastjepa", *words]), rules.why_not_run(" ".join(["fastjepa", *words]))
    given = rules.with_options([found for word in words for found in _found(rules.stand_in(word))])
    if words[0] == "train":
        return _train(given[1:])
    if words[0] == "plan":
        assert plan.main(given[1:]) == 0
        return None
    options = cli._parser().parse_args(given)
    if why is not None:
        if getattr(options, "config", None):
            load_config(options.config, options.overrides)
        return None
    for first, added in rules.ADDED.items():
        if command.startswith(f"fastjepa {first}") and "--compare" not in given:
            given += added
    assert cli.main(given) == 0
    return None


def _train(words: Words) -> None:
    """First as it stands, as far as its configuration; then a small run."""
    given = [rules.stand_in(word) for word in words]
    assert trainer.main([*given, "--print-config"]) == 0
    if "--print-config" not in given:
        assert trainer.main([*given, *rules.SMALL_RUN]) == 0


def _script(words: Words) -> None:
    assert words[0].endswith("fastjepa/train.py"), f"no rule for the script {words[0]}"
    assert Path(words[0]).is_file()
    _train(words[1:])


def _torchrun(words: Words) -> None:
    """Its own parser takes its options; the script runs as one process."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    _script([options.training_script, *options.training_script_args])


def _deepspeed(words: Words) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(words)
    _script([options.user_script, *options.user_args])


def _sbatch(words: Words) -> None:
    """The script exists and is one of bash; what it is given trains as one process."""
    script, config, run_dir, *overrides = [word for word in words if not word.startswith("--")]
    subprocess.run(["bash", "-n", script], check=True)
    assert "#SBATCH --nodes=" in Path(script).read_text()
    _train(["--config", config, f"run.dir={run_dir}", *overrides])


def _make(words: Words) -> None:
    """make says what it would run; where that trains, it trains."""
    target = next((word for word in words if "=" not in word), "help")
    said = make(ROOT, "-n", *words)
    assert said.returncode == 0, said.stderr
    if target == "train":
        line = said.stdout.strip().splitlines()[-1]
        _script(shlex.split(line)[1:])
    else:
        assert target == "help" or rules.TARGETS_WITHOUT_RUN.fullmatch(target), f"no rule for make {target}"


def _pip(words: Words) -> None:
    """What is installed is this distribution, by its name or from the checkout, with extras that it has."""
    asked = [re.fullmatch(r"(?:fastjepa|\.)(?:\[([a-z,]+)\])?", word) for word in words[1:]]
    extras = {extra for match in asked if match and match[1] for extra in match[1].split(",")}
    assert words[0] == "install"
    assert asked, words
    assert all(asked), f"not ours to install: {words}"
    has = set(re.findall(r'^        "([a-z]+)": [A-Z]+,$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert extras <= has, f"setup.py has no extras {extras - has}"


def _found(word: str) -> list[str]:
    """As a shell would have it."""
    return sorted(glob(word)) or [word] if "*" in word and "://" not in word else [word]


RULES: dict[str, Callable[[list[str]], None]] = {
    "fastjepa": _fastjepa,
    "python": _script,
    ".venv/bin/python": _script,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "sbatch": _sbatch,
    "make": _make,
    "pip": _pip,
}
