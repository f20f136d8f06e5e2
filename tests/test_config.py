"""Configurations: what is read, what is refused, and what it says then."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config import Config, ConfigError, Within, differences, load_config, parse_config
from fastjepa.train import main


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_valid_and_the_name_is_the_files(tmp_path: Path) -> None:
    assert load_config(None) == Config()
    for text in ("", "run:\n", "model:\noptim:\n", "# nothing\n"):
        config = load_config(write(tmp_path, text))
        assert config.run.name == "recipe"
        config.run.name = Config().run.name
        assert config == Config()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("optim.lr=5", "optim", "lr", 5.0),
        ("optim.eps=1.0e-8", "optim", "eps", 1e-8),
        ("optim.betas=[0.9, 0.95]", "optim", "betas", (0.9, 0.95)),
        ("data.crop_scale=null", "data", "crop_scale", None),
        ("data.crop_scale=[1e-1, 1]", "data", "crop_scale", (0.1, 1.0)),
        ("data.root=/images/a=b", "data", "root", "/images/a=b"),
        ("masks.context_tokens=14", "masks", "context_tokens", 14),
        ("objective.norm_pix_loss=false", "objective", "norm_pix_loss", False),
        ("run.name='2024'", "run", "name", "2024"),
        ("speed.zero_stage=2", "speed", "zero_stage", 2),
        ("run.seed=-9223372036854775808", "run", "seed", -(2**63)),
    ],
)
def test_overrides(override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_config(None, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_over_earlier_ones_and_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1, start_lr: 2}\ndeepspeed: {a: {b: 1, c: 2}}")
    config = load_config(path, ["optim.lr=3", "optim.lr=4", "deepspeed.a.b=5", "deepspeed.d=6"])
    assert (config.optim.lr, config.optim.start_lr) == (4.0, 2.0)
    assert config.deepspeed == {"a": {"b": 5, "c": 2}, "d": 6}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.leraning_rate=1", "unknown key optim.leraning_rate"),
        ("optim.weight_deca=1", "unknown key optim.weight_deca: did you mean optim.weight_decay?"),
        ("optin.lr=1", "unknown key optin: did you mean optim?"),
        ("speed.precision=bf16", "(there is optim.precision)"),
        ("model.lr=1", "(there is optim.lr)"),
        ("lr=1", "an override is section.key=value, got 'lr=1': did you mean optim.lr=1?"),
        ("mine.yaml", "got 'mine.yaml'; a configuration file comes after --config: --config mine.yaml"),
        ("optim.lr", "an override is section.key=value"),
        ("optim..lr=1", "an override is section.key=value"),
        ("--optim.lr=1", "unknown key --optim: did you mean optim?"),
        ("optim.lr=[", "no valid YAML"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("optim.lr=true", "optim.lr must be a number, got True"),
        ("optim.lr=", "optim.lr must be a number, got None"),
        ("optim.lr=nan", "optim.lr must be a number, got 'nan'"),
        ("optim.lr=.inf", "optim.lr must be a number, got inf"),
        ("optim.lr.x=1", "optim.lr must be a number, got {'x': 1}"),
        ("optim.lr=-1e-3", "optim.lr must be at least 0, got '-1e-3'"),
        ("optim.betas=[0.9, 1.0]", "optim.betas[1] must be at least 0 and below 1, got 1.0"),
        ("optim.betas=0.9", "optim.betas must be a list of 2 numbers, got 0.9"),
        ("optim.betas=[0.9]", "optim.betas must be a list of 2 numbers, got [0.9]"),
        ("optim.momentum=1.5", "optim.momentum must be from 0 to 1, got 1.5"),
        ("optim.global_batch=64.0", "optim.global_batch must be a whole number, got 64.0"),
        ("optim.global_batch=0", "optim.global_batch must be at least 1, got 0"),
        ("optim.steps=0", "optim.steps must be at least 1, got 0"),
        ("optim.steps=10", "as optim.epochs=null), got epochs 300 and steps 10"),
        ("optim.epochs=null", "give one, and null for the other (as optim.epochs=null), got neither"),
        ("objective.norm_pix_loss=1", "objective.norm_pix_loss must be true or false, got 1"),
        ("run.dir=7", "run.dir must be text, got 7"),
        ("run.dir=runs/{nmae}", "run.dir may hold {name}, which is run.name, got {nmae} in 'runs/{nmae}'"),
        ("run.seed=1e99", "run.seed must be a whole number"),
        ("run.seed=9223372036854775808", "run.seed must be a 64-bit number"),
        ("masks.mode=budge", "one of truncate, budget, packed, got 'budge'; did you mean budget?"),
        ("speed.zero_stage=4", "speed.zero_stage must be one of auto, 0, 1, 2, 3, got 4"),
        ("speed.zero_stage=true", "speed.zero_stage must be one of auto, 0, 1, 2, 3, got True"),
        ("model.size=free", "model.size free needs model.width, model.depth and model.heads"),
        ("data.std=[0.0, 1, 1]", "data.std[0] must be above 0, got 0.0"),
        ("data.mean=[0.5]", "one value for each of 3 channels"),
        ("data.name=folder", "needs data.root"),
        ("deepspeed=3", "an override is section.key=value"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold sections (model:, optim:, …), got list"),
        ("hello", "must hold sections"),
        ("optim: {lr: [}", "is no valid YAML"),
        ("optim: 3", "optim must hold keys and values, got 3"),
        ("run: tiny", "run must hold keys and values, got 'tiny'"),
        ("deepspeed: [1]", "deepspeed must hold keys and values"),
        ("optim:\n  lr: 1\nmodell: {}", "unknown key modell: did you mean model?"),
        ("7: {}", "unknown key 7"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {name: café}".encode("latin-1"))
    with pytest.raises(ConfigError, match="is no valid YAML"):
        load_config(tmp_path / "latin.yaml")


def write_files(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_file_is_laid_over_its_bases_and_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "fast.yaml").write_text(
        "base: ../root.yaml\nspeed: {workers: 3}\noptim: {lr: 3, betas: [0.8, 0.9]}"
    )
    path = write_files(
        tmp_path,
        root="optim: {lr: 1, start_lr: 1, eps: 1}\ndeepspeed: {a: {b: 1, c: 1}}\nspeed: {workers: 1}",
        other="optim: {lr: 2, start_lr: 2}\nrun:\n",
        recipe="base: [other.yaml, parts/fast.yaml]\noptim: {eps: 4}\ndeepspeed: {a: {c: 4}}\nmodel:\n",
    )
    config = load_config(path, ["optim.eps=5"])
    optim = config.optim
    # Of root.yaml, which fast.yaml names, what it says goes before what other.yaml says.
    assert (optim.lr, optim.start_lr, optim.eps, optim.betas) == (3.0, 1.0, 5.0, (0.8, 0.9))
    assert (config.speed.workers, config.deepspeed) == (3, {"a": {"b": 1, "c": 4}})
    assert config.run.name == "recipe"
    assert parse_config(yaml.safe_load(config.to_yaml())) == config, "what is printed needs no base"
    assert load_config(write_files(tmp_path, recipe="base: other.yaml")).optim.start_lr == 2
    assert load_config(write_files(tmp_path, recipe="base:\n")).optim == Config().optim


def test_the_same_base_by_two_ways_is_no_cycle(tmp_path: Path) -> None:
    path = write_files(
        tmp_path,
        root="speed: {workers: 7}",
        one="base: root.yaml",
        two="base: root.yaml",
        recipe="base: [one.yaml, two.yaml]",
    )
    assert load_config(path).speed.workers == 7


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"recipe": "base: recipe.yaml"}, r"recipe\.yaml is its own base, by way of .*recipe\.yaml"),
        (
            {"recipe": "base: a.yaml", "a": "base: b.yaml", "b": "base: a.yaml"},
            r"a\.yaml is its own base, by way of .*recipe\.yaml and .*a\.yaml and .*b\.yaml",
        ),
        (
            {"recipe": "base: gone.yaml"},
            r"cannot read the configuration .*gone\.yaml, the base of .*recipe\.yaml: No such file",
        ),
        ({"recipe": "base: a.yaml", "a": "optim: ["}, r"a\.yaml is no valid YAML"),
        ({"recipe": "base: a.yaml", "a": "- 1"}, r"a\.yaml must hold sections"),
        ({"recipe": "base: {a: b}"}, r"base in .*recipe\.yaml must be the name of a file, or a list of them"),
        ({"recipe": "base: [1]"}, r"must be the name of a file, or a list of them, got \[1\]"),
        ({"recipe": "base: a.yaml", "a": "optin: {}"}, "unknown key optin: did you mean optim"),
    ],
)
def test_bases_that_cannot_be(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_files(tmp_path, **files))


def test_who_only_plans_need_not_say_where_images_are() -> None:
    assert load_config(None, ["data.name=folder"], needs_data=False).data.root is None
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load_config(None, ["data.name=folder"])


def keys() -> list[tuple[str, str, Any]]:
    """Section, key and type of every value there is."""
    sections = typing.get_type_hints(Config)
    return [
        (name, key, hint)
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for key, hint in typing.get_type_hints(section, include_extras=True).items()
    ]


@pytest.mark.parametrize(("section", "key", "hint"), keys(), ids=lambda value: str(value)[:20])
def test_every_number_has_its_bounds_checked(section: str, key: str, hint: Any) -> None:
    bounds = [found for part in (hint, *typing.get_args(hint)) for found in getattr(part, "__metadata__", ())]
    for within in bounds:
        assert isinstance(within, Within)
        default = getattr(getattr(Config(), section), key)
        below: Any = within.low - 1
        if isinstance(default, tuple):
            below = [below] * len(default)
        with pytest.raises(ConfigError, match=within.words):
            parse_config({section: {key: below}})


@given(
    lr=st.floats(0, 1e30),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    seed=st.integers(-(2**63), 2**63 - 1),
    name=st.text(),
    crop=st.none() | st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)),
)
def test_yaml_round_trip(
    lr: float, betas: tuple[float, float], seed: int, name: str, crop: tuple[float, float] | None
) -> None:
    config = Config()
    config.optim.lr, config.optim.betas = lr, betas
    config.run.seed, config.run.name = seed, name
    config.data.crop_scale = crop
    config.deepspeed = {"zero_optimization": {"overlap_comm": True}}
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert parse_config(config.to_dict()) == config


def test_print_config_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "optim: {lr: 1e-4, betas: [0.8, 0.9]}\ndata: {crop_scale: null}")
    assert main(["optim.steps=5", "--config", str(path), "optim.epochs=null", "--print-config"]) == 0
    printed = capsys.readouterr().out
    again = write(tmp_path, printed)
    assert load_config(again) == load_config(path, ["optim.epochs=null", "optim.steps=5"])
    assert load_config(again).run.name == "recipe"
    assert main(["--config", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def changed(section: str, key: str) -> Config:
    """The defaults with another value there."""
    config = Config()
    part = getattr(config, section)
    value = getattr(part, key)
    setattr(part, key, "another" if not isinstance(value, int | float) else math.pi + value)
    return config


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, key, _ in keys()])
def test_only_what_changes_results_is_part_of_them(section: str, key: str) -> None:
    """DESIGN: a run with the same first part gives the same curve whatever the second says."""
    differs = bool(differences(Config().results_part(), changed(section, key).results_part()))
    decides = section in ("model", "masks", "objective", "optim", "data") or (section, key) in (
        ("run", "seed"),
        ("run", "init_from"),
        ("run", "on_spike"),
        ("run", "max_bad_steps"),
        ("speed", "target_precision"),
    )
    may_move = section == "data" and key in ("root", "probe_root", "max_bad_fraction")
    assert differs == (decides and not may_move)


def test_the_students_precision_by_its_name_is_no_other() -> None:
    auto, told = Config().results_part(), load_config(None, ["speed.target_precision=bf16"]).results_part()
    assert differences(auto, told) == []
    fp8 = load_config(None, ["speed.target_precision=fp8"]).results_part()
    assert differences(auto, fp8) == ["speed.target_precision: bf16 -> fp8"]


def test_what_deepspeed_is_told_is_part_of_the_results_but_may_not_contradict_the_rest() -> None:
    told = load_config(None, ["deepspeed.communication_data_type=fp32"])
    assert differences(Config().results_part(), told.results_part()) == [
        "deepspeed.communication_data_type: None -> fp32"
    ]
    zero = load_config(None, ["deepspeed.zero_optimization.zero_quantized_gradients=true"])
    assert len(differences(Config().results_part(), zero.results_part())) == 1
    talk = ["deepspeed.steps_per_print=3", "deepspeed.zero_optimization.reduce_bucket_size=1000"]
    assert not differences(Config().results_part(), load_config(None, talk).results_part())
    for key, ours in (
        ("train_batch_size=7", "optim.global_batch"),
        ("zero_optimization.stage=3", "speed.zero_stage"),
        ("zero_optimization.compute_grad_norm=false", "run.max_bad_steps"),
        ("bf16.check_grad_overflow=false", "run.max_bad_steps"),
        ("fp16.enabled=true", "optim.precision"),
    ):
        with pytest.raises(ConfigError, match=f"deepspeed.* is set through {ours} here"):
            load_config(None, [f"deepspeed.{key}"])


@pytest.mark.parametrize(
    "key", ["zero_hpz_partition_size=8", "mics_shard_size=4", "zero_quantized_weights=true"]
)
def test_deepspeed_may_hold_no_weights_that_checkpoints_do_not_reach(key: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_optimization.{key.partition('=')[0]} is not supported"):
        load_config(None, [f"deepspeed.zero_optimization.{key}"])


def test_where_a_run_goes_back_to_is_part_of_the_results_if_it_may() -> None:
    seldom = ["run.save_every=77", "run.log_every=7"]
    assert differences(Config().results_part(), load_config(None, seldom).results_part()) == []
    often, seldom = ["run.on_spike=rollback"], [*seldom, "run.on_spike=rollback"]
    changed = differences(load_config(None, often).results_part(), load_config(None, seldom).results_part())
    assert changed == ["run.log_every: 10 -> 7", "run.save_every: 1000 -> 77"]


def test_differences_name_nested_keys_and_both_values() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, 3], "d": 0}, "new": {}}
    assert differences(old, new) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: None -> 0",
        "gone: 3 -> None",
        "new: None -> {}",
    ]
    assert differences(old, old) == []
