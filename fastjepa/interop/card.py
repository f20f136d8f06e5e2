"""The model card of an export: what it is, where it comes from, how it is loaded."""

from pathlib import PurePath

from fastjepa.config import Config
from fastjepa.interop.formats import Format, Handover
from fastjepa.interop.loading import heads_of
from fastjepa.interop.provenance import Provenance, version_of_code
from fastjepa.interop.vit_mae import decoder_of
from fastjepa.models import HEADS_OF_WIDTH
from fastjepa.objectives import JEPA, MAE
from fastjepa.report.load import Probe

LIBRARIES = {
    "transformers": "transformers",
    "transformers-mae": "transformers",
    "timm": "timm",
    "onnx": "onnx",
}
INPUTS = {
    "onnx": "8-bit pixels, uint8 [batch, channels, height, width]: the graph normalises them itself",
    "torch": "8-bit pixels, uint8 [batch, channels, height, width]: the graph normalises them itself",
    "transformers": "normalised pixels, as the image processor beside it makes them",
    "transformers-mae": "normalised pixels, as the image processor beside it makes them",
    "timm": "normalised pixels, as the transform of its configuration makes them",
}
FASTJEPA_INPUT = "8-bit pixels, or normalised ones in floating point"


def write_card(given: Handover, form: Format, origin: Provenance, name: str, checked: str) -> str:
    """The card, in Markdown.

    Args:
        given: what was exported.
        form: in which format.
        origin: where it comes from.
        name: of the file or folder.
        checked: how it was compared with the encoder here.
    """
    sections = [
        _front(form),
        f"# {name}\n",
        _what_it_is(given, form),
        "## How it was trained\n",
        _training(given, origin),
        "## How good it is\n",
        _probes(given, origin),
        "## How to load it\n",
        f"From the folder that `{name}` is in, with a picture `image.png`:\n",
        f"```python\n{form.lines(given, name)}```\n",
        "## Checked\n",
        f"{checked}\n",
        "## Licence\n",
        "Not stated. Whoever passes the weights on says it, here and in the first lines of this file.\n",
    ]
    return "\n".join(sections)


def _front(form: Format) -> str:
    library = f"library_name: {LIBRARIES[form.name]}\n" if form.name in LIBRARIES else ""
    # transformers' pipeline of that name would hide patches.
    pipeline = "" if form.name == "transformers-mae" else "pipeline_tag: image-feature-extraction\n"
    return f"---\nlicense: # yours to say\n{library}{pipeline}tags: [fastjepa, self-supervised]\n---\n"


def _table(rows: list[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _what_it_is(given: Handover, form: Format) -> str:
    encoder, shape = given.encoder, given.encoder.shape
    trained, (height, width) = given.model.encoder.shape.image_size, shape.image_size
    resized = (
        ""
        if trained == shape.image_size
        else (
            f", trained on {trained[0]} x {trained[1]}; its positions are computed for the new grid, over "
            "the extent of the trained one"
        )
    )
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    method = "I-JEPA" if isinstance(given.model, JEPA) else "MAE"
    which = {"target": "target encoder (the slow average)", "context": "context encoder"}[given.which]
    token = "a class token, then one per patch" if shape.class_token else "one per patch, no class token"
    rows: list[tuple[str, object]] = [
        ("Method", f"{method}, {which}" if isinstance(given.model, JEPA) else method),
        ("Encoder", f"vision transformer, {shape.depth} blocks of width {shape.width}, {shape.heads} heads"),
        ("Parameters", f"{numbers:,}"),
        ("Images", f"{height} x {width} pixels, {shape.channels} channel(s){resized}"),
        ("Patches", f"{shape.patch_size} x {shape.patch_size} pixels, so {shape.grid[0]} x {shape.grid[1]}"),
        ("Tokens", f"{token}; layer-normed"),
        ("Features", "the mean of the patches' tokens"),
        ("Input", INPUTS.get(form.name, FASTJEPA_INPUT)),
        ("Normalisation", f"(pixel / 255 - mean) / std, mean {_numbers(encoder.pixel_mean)}, "
                          f"std {_numbers(encoder.pixel_std)}"),
    ]  # fmt: skip
    if form.name == "official":
        networks = "encoder, predictor and target encoder" if method == "I-JEPA" else "encoder and decoder"
        rows.append(("Holds", f"{networks}, in the layout that {method} was published in"))
    if form.name == "transformers-mae":
        rows += _painting(given)
    if given.head is not None:
        rows.append(("Classes", ", ".join(given.head.names)))
    return _table(rows)


def _painting(given: Handover) -> list[tuple[str, object]]:
    model, decoder = given.model, decoder_of(given.model)
    assert isinstance(model, MAE), "or there is no decoder"
    width, heads = decoder.decoder_embed.out_features, heads_of(model)["decoder_heads"]
    numbers = sum(parameter.numel() for parameter in decoder.parameters())
    pixels = "pixels normalised patch by patch" if model.norm_pix_loss else "normalised pixels"
    return [
        ("Decoder", f"{len(decoder.decoder_blocks)} blocks of width {width}, {heads} heads"),
        ("Parameters of the decoder", f"{numbers:,}"),
        ("Loss", f"mean squared error of hidden {pixels}; {model.mask_ratio:.0%} of the patches are hidden"),
    ]


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _training(given: Handover, origin: Provenance) -> str:
    rows: list[tuple[str, object]] = [("Source", origin.source)]
    if origin.config is None or origin.position is None:
        shape = given.encoder.shape
        usual = HEADS_OF_WIDTH.get(shape.width) == shape.heads
        heads = f"{shape.heads} heads, as published for its width; " if usual else ""
        rows.append(
            ("Known", f"what its tensors show; {heads}the normalisation is that of ImageNet, as published")
        )
    else:
        config, there = origin.config, origin.position
        schedule = (
            f"{config.optim.steps:,} steps" if config.optim.steps else f"{config.optim.epochs:g} epochs"
        )
        rows += [
            ("Data", f"{_data(config)}, {there.dataset_images:,} images"),
            ("Masks", _masks(config)),
            ("Objective", _objective(config)),
            (
                "Trained for",
                f"{there.step:,} steps, {there.images_seen:,} images seen, of {schedule} planned",
            ),
            ("Global batch", f"{config.optim.global_batch:,} images"),
            ("Optimizer", f"AdamW, learning rate {config.optim.lr:g}, in {config.optim.precision}"),
            ("Seed", config.run.seed),
            ("Trained with", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
        ]
        if config.run.init_from:
            rows.append(("Began from", PurePath(config.run.init_from).name))
    rows.append(("Exported by", f"fastjepa {version_of_code()}"))
    return _table(rows)


def _data(config: Config) -> str:
    if config.data.name == "folder":  # where it lies is the owner's business
        return f"the folder {PurePath(config.data.root or '').name}"
    return {"fashion_mnist": "Fashion-MNIST"}[config.data.name]


def _masks(config: Config) -> str:
    masks = config.masks
    if config.objective.name == "mae":
        return f"random, {masks.mask_ratio:.0%} of the patches hidden"
    low, high = masks.target_scale
    targets = f"{masks.target_blocks} target blocks of {low:.0%} to {high:.0%} of the image"
    return f"{targets}, context of mode `{masks.mode}`"


def _objective(config: Config) -> str:
    if config.objective.name == "mae":
        pixels = "pixels normalised patch by patch" if config.objective.norm_pix_loss else "pixels"
        return f"MAE (arXiv:2111.06377): mean squared error of hidden {pixels}"
    return "I-JEPA (arXiv:2301.08243): smooth L1 to the target encoder's tokens of hidden blocks"


def _probes(given: Handover, origin: Provenance) -> str:
    if not origin.probes:
        return "The run was not judged at this step.\n"
    note = f"\nEncoders are {origin.probe_note}.\n" if origin.probe_note else ""
    if isinstance(given.model, JEPA) and not any(f"{given.which} encoder" in p.name for p in origin.probes):
        note += f"\nThe {given.which} encoder, which this is, was not judged at this step.\n"
    lines = ["| | kNN top-1 | linear top-1 | effective rank |", "|---|---|---|---|"]
    lines += [_row(probe) for probe in origin.probes]
    return "\n".join(lines) + "\n" + note


def _row(probe: Probe) -> str:
    top1 = ("" if value is None else f"{value:.1%}" for value in (probe.knn_top1, probe.linear_top1))
    rank = "" if probe.rankme is None else f"{probe.rankme:.1f}"
    return f"| {' | '.join([probe.name, *top1, rank])} |"
