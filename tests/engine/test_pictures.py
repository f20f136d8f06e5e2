"""What a run shows, from its first snapshot to its report, and that training does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa.config import parse_config
from fastjepa.data.views import read_views
from fastjepa.engine.build import build_masks, build_model
from fastjepa.engine.images import open_images
from fastjepa.engine.learner import Encoders
from fastjepa.engine.pictures import as_target, look
from fastjepa.masks import Masks
from fastjepa.objectives import JEPA
from fastjepa.report.load import load_run
from tests.conftest import TINY

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_a_run_shows_what_it_predicts(train: "Trainer", objective: str) -> None:
    """The snapshots of a real run hold the tensors, and its report the pictures."""
    mae = ("model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2")
    more = (*mae, "masks.context_tokens=null") if objective == "mae" else ()
    train("optim.steps=5", "run.report=true", f"objective.name={objective}", *more).check()
    first, last = load_run(train.run).snapshots
    assert first.step == 0
    assert last.showing.neighbours is not None
    assert last.showing.attended is not None
    assert last.class_names[0] == "T-shirt/top"
    titles = {"Nearest images", "Where the encoder looks"}
    if objective == "jepa":
        assert first.showing.predictions is not None
        assert last.showing.predictions is not None
        assert last.targets is not None
        assert last.showing.predictions.centred.shape == last.targets.shape
        assert last.showing.retrieved is not None
        assert last.showing.retrieved.by_target.shape == last.images.shape
        assert last.showing.painted is None
        titles |= {"What the predictor predicts", "Predictions as patches of other images"}
    else:
        assert last.showing.predictions is None
        assert last.showing.painted is not None
        assert bool(last.showing.painted.is_normalised)
        titles |= {"What the decoder paints"}
    page = (train.run / "report" / "index.html").read_text()
    for title in titles:
        assert f"<h3>{title}</h3>" in page
    assert all(path.stat().st_size < 1 << 20 for path in (train.run / "report" / "snapshots").iterdir())


def test_a_predictor_that_is_cut_shows_the_same(
    trainer_at: "Callable[[Path], Trainer]", tmp_path: Path
) -> None:
    shown = []
    for stage in ("0", "3"):
        home = tmp_path / stage
        home.mkdir()
        trainer = trainer_at(home)
        trainer("optim.steps=5", f"speed.zero_stage={stage}").check()
        _, last = load_run(trainer.run).snapshots
        assert last.step == 5
        assert last.showing.predictions is not None
        shown.append(last.showing.predictions)
    whole, cut = shown
    torch.testing.assert_close(cut.centred, whole.centred, rtol=0, atol=2e-3)
    torch.testing.assert_close(cut.cosine, whole.cosine, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mode", ["budget", "packed", "truncate"])
def test_looking_changes_nothing_and_compares_what_the_loss_does(mode: str) -> None:
    tokens = {"context_tokens": 10} if mode == "budget" else {}
    config = parse_config(TINY | {"masks": {"mode": mode, "min_keep": 4, **tokens}})
    model, images, sampler = build_model(config), open_images(config), build_masks(config)
    assert isinstance(model, JEPA)
    assert images.queries is not None
    views = read_views(images.queries, [0, 7, 40], 28)
    masks: Masks = sampler.sample(views.image_index)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        features = model.target_encoder(views.pixels)
        networks = Encoders(model.encoder, model.target_encoder, model.predictor)
        showing = look(networks, images.queries, views, features, masks, images.train, config)
        said = model.predict(views.pixels, masks.context, masks.targets, masks.cu_seqlens)
        loss = model.loss(views.pixels, masks.context, masks.targets, masks.cu_seqlens)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    target = as_target(features)[torch.arange(3)[:, None], masks.targets]  # [M, n, P, D]
    torch.testing.assert_close(torch.nn.functional.smooth_l1_loss(said, target), loss)
    cosine = torch.nn.functional.cosine_similarity(said, target, dim=-1)
    assert showing.predictions is not None
    torch.testing.assert_close(showing.predictions.cosine, cosine.half(), rtol=0, atol=2e-3)
