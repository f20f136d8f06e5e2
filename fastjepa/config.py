"""The configuration of a run: dataclasses, filled from YAML and from `section.key=value`.

`model`, `masks`, `objective`, `optim` and `data` change results, `probe` how they are judged, `speed` only
how fast they come, `run` where they go. Two runs with the same first part give the same curve, within
floating point. The few keys of `speed` and `run` that change results after all are in `results_part`.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from fastjepa.passed_on import deciding, refusal

RESULT_SECTIONS = ("model", "masks", "objective", "optim", "data")
# Which weights, images and masks, and which steps are taken back or are the last.
_RESULTS_OF_RUN = ("seed", "init_from", "on_spike", "max_bad_steps")
_RESULTS_OF_ROLLBACK = ("save_every", "log_every")  # where it goes back to, and how much it leaves out


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Within:
    """What a number may be, in words and from `low` to `high`, both included."""

    words: str
    low: float
    high: float = math.inf


Count = Annotated[int, Within("at least 1", 1)]
CountOrNone = Annotated[int, Within("at least 0", 0)]
Several = Annotated[int, Within("at least 2", 2)]
Seed = Annotated[int, Within("a 64-bit number", -(2**63), 2**63 - 1)]
Positive = Annotated[float, Within("above 0", math.ulp(0.0))]
NotNegative = Annotated[float, Within("at least 0", 0)]
Fraction = Annotated[float, Within("from 0 to 1", 0, 1)]
BelowOne = Annotated[float, Within("at least 0 and below 1", 0, math.nextafter(1, 0))]


@dataclass
class ModelConfig:
    # Of the encoder and the predictor: ViT-Ti to ViT-g; free takes width, depth and heads below instead.
    size: Literal["tiny", "small", "base", "large", "huge", "giant", "free"] = "small"
    patch_size: Count = 16  # pixels of a side
    # published: N(0, .02); xavier: Xavier uniform, under which small patches are not lost among positions.
    init: Literal["published", "xavier"] = "xavier"
    # Null leaves what model.size says; size free needs width, depth and heads.
    width: Count | None = None  # of a token of the encoder
    depth: Count | None = None  # blocks of the encoder
    heads: Count | None = None  # of attention, in the encoder
    mlp_ratio: Positive | None = None  # hidden width of an MLP, by the width of a token
    predictor_width: Count | None = None  # of a token of the predictor
    predictor_depth: Count | None = None  # blocks of the predictor
    predictor_heads: Count | None = None  # of attention, in the predictor; by default the encoder's
    decoder_width: Count = 512  # of a token of MAE's decoder
    decoder_depth: Count = 8  # blocks of MAE's decoder
    decoder_heads: Count = 16  # of attention, in MAE's decoder


@dataclass
class MasksConfig:
    # Contexts of unequal length: truncate cuts them to the shortest, budget draws a fixed number, packed
    # keeps all.
    mode: Literal["truncate", "budget", "packed"] = "budget"
    # Patches in sight, in mode budget; null: as many as 95 % of draws reach.
    context_tokens: Count | None = None
    # Patches of a target block, in mode budget; null: of the smallest block.
    target_tokens: Count | None = None
    target_blocks: Count = 4  # blocks to predict, of each image
    target_scale: tuple[float, float] = (0.15, 0.2)  # size of a target block: least and most, of all patches
    target_aspect: tuple[float, float] = (0.75, 1.5)  # its height by its width: least and most
    # Size of the context block, before targets are taken out.
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_aspect: tuple[float, float] = (1.0, 1.0)  # its height by its width: least and most
    min_keep: CountOrNone = 10  # a context of so few patches, or fewer, is drawn again
    mask_ratio: float = 0.75  # of MAE: the share of patches that is hidden


@dataclass
class ObjectiveConfig:
    name: Literal["jepa", "mae"] = "jepa"  # what is trained: I-JEPA, or MAE
    norm_pix_loss: bool = True  # of MAE: pixels are normalised patch by patch before they are compared


@dataclass
class OptimConfig:
    global_batch: Count = 2048  # images per optimizer step, over all ranks and accumulation
    epochs: Positive | None = 300.0  # over the training images
    steps: Count | None = None  # instead of epochs
    lr: NotNegative = 1e-3  # of AdamW, at the end of the warm-up
    start_lr: NotNegative = 2e-4  # at the first step, rising linearly to lr
    final_lr: NotNegative = 1e-6  # at the last step, falling along a cosine from lr
    warmup_epochs: NotNegative = 40.0  # of the rise from start_lr to lr
    weight_decay: NotNegative = 0.04  # at the first step; none on biases and norms
    final_weight_decay: NotNegative = 0.4  # at the last step, along a cosine
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)  # of AdamW's two moments
    eps: NotNegative = 1e-8  # of AdamW's denominator
    momentum: Fraction = 0.996  # of the target encoder's average at the first step, rising linearly
    final_momentum: Fraction = 1.0  # of the target encoder's average at the last step
    clip_grad: NotNegative = 0.0  # largest gradient norm; 0 for none
    # Of forward and backward; master weights and moments are fp32.
    precision: Literal["fp32", "bf16"] = "bf16"


@dataclass
class DataConfig:
    # What kind of images data.root holds.
    name: Literal["fashion_mnist", "folder", "shards"] = "fashion_mnist"
    # A folder of images; of indexed shards, or a URL of them; or of the full Fashion-MNIST.
    root: str | None = None
    probe_root: str | None = None  # held-out labelled images: a folder, or shards beside shards
    image_size: Count = 224  # pixels of a side of the square view that is trained on
    channels: Count = 3  # of an image: 3, or 1 for grey
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, of pixels from 0 to 1
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)  # likewise; `fastjepa data stats` measures both
    crop_scale: tuple[float, float] | None = (0.3, 1.0)  # of RandomResizedCrop; null for none
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # of RandomResizedCrop, width by height
    flip: Fraction = 0.0  # probability that a view is mirrored left to right
    shuffle_shards: Count = 16  # shards whose images are shuffled together
    # Unreadable images are skipped; more than this share of them ends the run.
    max_bad_fraction: Fraction = 0.05
    hold_out: CountOrNone = 0  # training images that are left out, to judge on in place of the test images


@dataclass
class ProbeConfig:
    at_ends: bool = True  # judge at the start, beside raw pixels, and at the end
    every_steps: CountOrNone = 0  # judge every so many steps in between; 0: never
    bank: Several = 5000  # labelled images that a probe learns from, while training
    queries: Several = 2000  # images that it is tested on, while training
    final_bank: Several = 50_000  # like bank, at the start and at the end
    final_queries: Several = 10_000  # like queries, at the start and at the end
    neighbours: Count = 20  # of kNN


@dataclass
class SpeedConfig:
    # How much is cut among ranks. auto: 0, without DeepSpeed, on one device; on several 2, or 1 where
    # speed.accumulation is above 1.
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    # Optimizer state and the target's fp32 shadow in host memory, at ZeRO 1 to 3.
    offload_optimizer: bool = False
    # Micro-batches per optimizer step: each has global_batch / ranks / accumulation images.
    accumulation: Count = 1
    # Activation checkpointing: compute activations again in backward, to save memory.
    checkpoint_blocks: bool = False
    # Implementation preferred for every op; auto: the fastest measured.
    kernels: Literal["auto", "triton", "cuda", "cpp", "torch"] = "auto"
    fused_blocks: bool = True  # a block is one forward and one backward pass, written out by hand
    compile: bool = False  # torch.compile for each block, instead of the fused ones
    # Of what is replayed. step: all of it, on one device at ZeRO 0; parts: encoders and predictor, with
    # masks of mode budget; auto: step wherever it can be, else none.
    cuda_graph: Literal["auto", "none", "parts", "step"] = "auto"
    skip_dead_work: bool = True  # leave out tokens of last blocks whose result nothing reads
    # Of the target encoder's pass; auto: optim.precision.
    target_precision: Literal["auto", "bf16", "fp8"] = "auto"
    # Run the target encoder on a CUDA stream of its own, beside the context encoder.
    target_stream: bool = False
    fused_update: bool = True  # AdamW and the target's average in one pass, at stage 0 on one device
    prefetch: bool = True  # the next batch is copied to the device while this one is computed
    workers: CountOrNone = 4  # loader processes of each rank; 0: load in the training process
    # What decodes JPEGs; auto: torchvision where it is installed. Views differ by two
    # of 255 levels at most, by more at their edges.
    decoder: Literal["auto", "pillow", "torchvision"] = "auto"
    # Where crops are resized and mirrored: by the loader processes, or as matrix products on the device.
    augment: Literal["cpu", "device"] = "cpu"
    worker_timeout_s: Positive = 300.0  # a loader process without a batch for so long is taken to hang
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one


@dataclass
class RunConfig:
    dir: str = "runs/{name}"  # the folder of the run; {name} is run.name
    name: str = "run"  # by default that of the configuration file, without its ending
    seed: Seed = 0  # of weights, order, crops and masks
    init_from: str | None = None  # start from these weights: a run, a checkpoint, or a published file
    report: bool = True  # write the report at the end; `fastjepa report` writes it at any time
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # trackers that get the rows of metrics.jsonl too
    log_every: Count = 10  # steps between rows of metrics.jsonl
    save_every: Count = 1000  # steps between checkpoints
    keep_last: Count = 2  # newest checkpoints that stay
    keep_every: Count | None = None  # of each so many steps, the first checkpoint stays for ever
    # auto: the newest good checkpoint, under the same settings; force: under others too; never: refuse any.
    resume: Literal["auto", "force", "never"] = "auto"
    join_within_s: Positive = 300.0  # seconds that ranks wait for each other at the start
    dead_after_s: Positive = 30.0  # a rank that is not heard from for so long is lost, and ends the run
    max_bad_steps: Count = 3  # so many steps in a row without a finite loss and gradients end the run
    # rollback: go back, once, to the checkpoint before it, and on without the data that led there.
    on_spike: Literal["warn", "rollback", "ignore"] = "warn"  # what to do when the loss jumps and stays up
    # A rank that others wait for so long hangs; 12 times that to save or judge.
    hang_after_s: Positive = 600.0


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged last into the generated configuration

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return plain

    def results_part(self) -> dict[str, Any]:
        """What must not differ between the parts of one run."""
        whole = self.to_dict()
        part = {name: whole[name] for name in RESULT_SECTIONS}
        # Images may move, and a run that stopped for bad ones may be told to go on.
        free = ("root", "probe_root", "max_bad_fraction")
        part["data"] = {k: v for k, v in whole["data"].items() if k not in free}
        of_rollback = _RESULTS_OF_ROLLBACK if self.run.on_spike == "rollback" else ()
        part["run"] = {name: whole["run"][name] for name in (*_RESULTS_OF_RUN, *of_rollback)}
        own = self.optim.precision if self.speed.target_precision == "auto" else self.speed.target_precision
        return part | {"speed": {"target_precision": own}, "deepspeed": deciding(whole["deepspeed"])}


def load_config(path: str | Path | None, overrides: Sequence[str] = (), needs_data: bool = True) -> Config:
    """Read a YAML file and apply `section.key=value` overrides, values in YAML syntax.

    A file may name others as its `base`: its keys are laid over theirs, and those of a later one in a list
    over those of an earlier.

    Args:
        path: of the file; None for the defaults.
        overrides: laid over it, in order.
        needs_data: refuse a configuration that does not say where its images are.

    Raises:
        ConfigError: an unknown key (the nearest right name is given), a wrong type, no such file or base, or
            a file that is its own base.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_file(Path(path))
        run = tree.setdefault("run", {})
        if isinstance(run, dict):
            run.setdefault("name", Path(path).stem)
    for override in overrides:
        _apply_override(tree, override)
    config: Config = _build(Config, tree, "")
    _check(config, needs_data)
    return config


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a file, laid over those of its bases; `above` are the files that it is a base of."""
    of_whom = f", the base of {above[-1]}" if above else ""
    if path.resolve() in [each.resolve() for each in above]:
        raise ConfigError(f"{path} is its own base, by way of {' and '.join(map(str, above))}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}{of_whom}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {_in_one_line(error)}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold sections (model:, optim:, …), got {type(loaded).__name__}")
    own = loaded or {}
    bases = _bases(own.pop("base", None), path)
    own = {section: {} if keys is None else keys for section, keys in own.items()}
    tree: dict[str, Any] = {}
    for base in bases:
        tree = merged(tree, _read_file(path.parent / base, (*above, path)))
    return merged(tree, own)


def _bases(named: Any, path: Path) -> list[str]:
    names = [named] if isinstance(named, str) else [] if named is None else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"base in {path} must be the name of a file, or a list of them, got {named!r}")
    return names


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says instead, dictionaries in them key by key."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def parse_config(tree: dict[str, Any]) -> Config:
    """A configuration from plain values, as `Config.to_dict` gives them."""
    config: Config = _build(Config, tree, "")
    _check(config, needs_data=True)
    return config


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs between two nested dictionaries."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError(f"an override is section.key=value, got {override!r}{_meant(override)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is no valid YAML: {_in_one_line(error)}") from error
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r} reaches into {name}, which is a value and not a section")
    tree[names[-1]] = value


def _meant(override: str) -> str:
    """What somebody meant who forgot the section, or the option before a file."""
    key, equals, _ = override.partition("=")
    if override.endswith((".yaml", ".yml")) and not equals:
        return f"; a configuration file comes after --config: --config {override}"
    sections = typing.get_type_hints(Config)
    meant = [f"{name}.{override}" for name, section in sections.items() if _has(section, key.strip())]
    return f": did you mean {' or '.join(meant)}?" if equals and meant else ""


def _has(section: Any, key: str) -> bool:
    return dataclasses.is_dataclass(section) and key in typing.get_type_hints(section)


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} must hold keys and values, got {tree!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in tree:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown key {prefix}{key}: {hint}{_elsewhere(cls, str(key))}")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()})


def _elsewhere(cls: type, key: str) -> str:
    """Where else a key of this name is, since the section is what people get wrong."""
    sections = typing.get_type_hints(Config)
    owners = [
        f"{name}.{key}" for name, section in sections.items() if section is not cls and _has(section, key)
    ]
    return f" (there is {', '.join(owners)})" if owners else ""


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, where YAML can have meant it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), {} if value is None else value, f"{name}.")
    if origin is Annotated:
        number, within = _convert(arguments[0], value, name), arguments[1]
        if not within.low <= number <= within.high:
            raise ConfigError(f"{name} must be {within.words}, got {value!r}")
        return number
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, name)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint_text = f"; did you mean {close[0]}?" if close else ""
        allowed = ", ".join(map(str, arguments))
        raise ConfigError(f"{name} must be one of {allowed}, got {value!r}{hint_text}")
    if origin is tuple:
        wanted = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, list | tuple) or (wanted is not None and len(value) != wanted):
            count = "" if wanted is None else f"{wanted} "
            of_what = "names" if typing.get_origin(arguments[0]) is Literal else "numbers"
            raise ConfigError(f"{name} must be a list of {count}{of_what}, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must hold keys and values, got {value!r}")
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {_TYPE_NAMES.get(hint, hint.__name__)}, got {value!r}")


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check(config: Config, needs_data: bool) -> None:
    """What no single key shows."""
    model, optim, data = config.model, config.optim, config.data
    if model.size == "free" and (model.width is None or model.depth is None or model.heads is None):
        raise ConfigError("model.size free needs model.width, model.depth and model.heads")
    if (optim.epochs is None) == (optim.steps is None):
        both = "neither" if optim.epochs is None else f"epochs {optim.epochs:g} and steps {optim.steps}"
        raise ConfigError(
            "optim.epochs and optim.steps both say how long to train: give one, and null for the other "
            f"(as optim.epochs=null), got {both}"
        )
    if len(data.mean) != data.channels or len(data.std) != data.channels:
        raise ConfigError(f"data.mean and data.std need one value for each of {data.channels} channels")
    unknown = re.search(r"\{.*?\}", config.run.dir.replace("{name}", ""))
    if unknown:
        raise ConfigError(
            f"run.dir may hold {{name}}, which is run.name, got {unknown[0]} in {config.run.dir!r}"
        )
    refused = refusal(config.deepspeed)
    if refused is not None:
        raise ConfigError(refused)
    if needs_data and data.name == "folder" and data.root is None:
        raise ConfigError("data.name folder needs data.root, the folder of images")
    if needs_data and data.name == "shards" and data.root is None:
        raise ConfigError(
            "data.name shards needs data.root, the folder or URL of indexed shards, or their index"
        )
    _check_graphs(config)


def possible_graphs(config: Config) -> list[str]:
    """What speed.cuda_graph may ask for besides none, as far as the file alone says.

    A CUDA graph repeats the same work on the same memory. `step` also needs one device.
    """
    speed, is_jepa = config.speed, config.objective.name == "jepa"
    if speed.device == "cpu" or speed.checkpoint_blocks:
        return []
    keeps_gradients = config.optim.precision == "bf16" or speed.accumulation == 1  # see check_speed
    kinds = {
        "step": speed.zero_stage in ("auto", 0) and speed.accumulation == 1,
        "parts": is_jepa and config.masks.mode == "budget" and keeps_gradients and speed.zero_stage != 3,
    }
    return [kind for kind, is_possible in kinds.items() if is_possible]


def _check_graphs(config: Config) -> None:
    speed, kind = config.speed, config.speed.cuda_graph
    if kind in ("auto", "none"):
        return
    instead = " or ".join([*possible_graphs(config), "none"])
    if speed.device == "cpu":
        raise ConfigError(f"speed.cuda_graph {kind} needs a GPU, and speed.device is cpu: use none")
    if speed.checkpoint_blocks:
        raise ConfigError(
            f"speed.cuda_graph {kind} cannot capture speed.checkpoint_blocks: use speed.cuda_graph none, or "
            "speed.checkpoint_blocks false"
        )
    if kind == "parts" and config.objective.name != "jepa":
        raise ConfigError(f"speed.cuda_graph parts is for objective.name jepa: use {instead}")
    if kind == "parts" and config.masks.mode != "budget":
        raise ConfigError(
            f"speed.cuda_graph parts needs masks.mode budget, whose shapes never change, got "
            f"{config.masks.mode}: use that mode, or speed.cuda_graph {instead}"
        )
    if kind == "step" and speed.zero_stage not in ("auto", 0):
        with_one = " and speed.accumulation 1" if speed.accumulation > 1 else ""
        raise ConfigError(
            f"speed.cuda_graph step needs speed.zero_stage 0 on one device, got stage {speed.zero_stage}: "
            f"use that stage{with_one}, or speed.cuda_graph {instead}"
        )
    if kind == "step" and speed.accumulation > 1:
        raise ConfigError(
            f"speed.cuda_graph step captures one micro-batch, got speed.accumulation {speed.accumulation}: "
            f"use 1, or speed.cuda_graph {instead}"
        )
