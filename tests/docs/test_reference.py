"""The pages that are made from the code say all of it."""

import dataclasses
import io
from contextlib import redirect_stdout

import pytest

from fastjepa import cli
from fastjepa.config import Config
from scripts.docs import commands, settings
from scripts.docs.hooks import kernels_page


def test_every_setting_says_what_it_means() -> None:
    silent = [
        f"{name}.{setting.name}"
        for name, section in settings.sections()
        for setting in settings.settings_of(section)
        if not setting.meaning
    ]
    assert not silent, f"no comment at their fields in fastjepa/config.py: {silent}"


def test_the_page_of_settings_has_all_of_them() -> None:
    page = settings.page()
    for name, values in Config().to_dict().items():
        assert f"## {name}\n" in page
        if name != "deepspeed":
            assert all(
                f"| `{key}` |" in page.replace("</span>", " | ").replace(f"`{name}.", "`") for key in values
            )


@pytest.mark.parametrize(
    ("name", "default", "allowed"),
    [
        ("optim.lr", "0.001", "a number, at least 0"),
        ("optim.steps", "null", "a whole number, at least 1, or `null`"),
        ("masks.mode", "budget", "`truncate`, `budget`, `packed`"),
        ("data.crop_scale", "[0.3, 1]", "a list, 2 of them: a number, or `null`"),
        ("run.track", "[]", "a list of any of `tensorboard`, `wandb`"),
        ("speed.prefetch", "true", "`true` or `false`"),
    ],
)
def test_what_a_setting_may_be(name: str, default: str, allowed: str) -> None:
    section, _, key = name.partition(".")
    found = {s.name: s for s in settings.settings_of(dict(settings.sections())[section])}[key]
    assert (found.default, found.allowed) == (default, allowed)


def test_comments_behind_a_field_come_before_those_above_it() -> None:
    found = {s.name: s for s in settings.settings_of(dict(settings.sections())["run"])}
    assert found["on_spike"].meaning.startswith("what to do when the loss jumps and stays up. rollback: go")
    assert dataclasses.fields(Config)[0].name == "model"


def test_every_command_is_listed_with_its_help() -> None:
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        cli.main(["--help"])
    page = commands.page()
    for words in commands.commands():
        assert f"## {' '.join(['fastjepa', *words])}\n" in page
        assert commands.help_of(words).startswith("usage: "), words
    listed = {words[0] for words in commands.commands() if words}
    assert {"train", "plan", "doctor", "probe", "export", "data"} <= listed
    assert all(f"    {name}" in said.getvalue() for name in listed)
    assert "--print-config" in page


def test_the_page_of_the_kernels_links_to_nothing_outside_the_site() -> None:
    assert "](../" not in kernels_page()
    assert kernels_page().count("\n## ") >= 5
