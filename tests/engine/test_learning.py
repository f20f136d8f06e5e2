"""That it learns, from images alone, and that it says so when it does not."""

import json
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Trainer

# All 10,000 embedded images, judged on the test set; wide enough to learn within a few hundred steps.
REAL = (
    "data.hold_out=0",
    "data.crop_scale=null",
    "model.width=64",
    "model.predictor_width=32",
    "masks.context_tokens=14",
    "masks.min_keep=10",
    "run.log_every=25",
    "run.save_every=1000",
)


@pytest.mark.slow
def test_features_improve_on_the_untrained_encoder_and_do_not_collapse(train: "Trainer") -> None:
    done = train(
        *REAL,
        "optim.steps=400",
        "optim.global_batch=64",
        "optim.lr=3e-3",
        "optim.warmup_epochs=0.3",
        "optim.momentum=0.98",
        "optim.weight_decay=0.04",
        "optim.final_weight_decay=0.04",
        "probe.at_ends=true",
        "probe.final_bank=1000",
        "probe.final_queries=1000",
    ).check()
    summary = json.loads((train.run / "report" / "summary.json").read_text())
    probed = {row["name"]: row for row in summary["probe"]}
    untrained, trained = probed["untrained encoder"], probed["trained target encoder"]
    # Seen: .54 -> .64. A thousand queries have a standard error of .015.
    assert trained["knn_top1"] > untrained["knn_top1"] + 0.05

    first, last = train.rows[0], train.rows[-1]
    assert last["loss"] < 0.6 * first["loss"]
    assert last["target_std"] > 0.5
    assert last["between_image_std"] > 0.2
    assert trained["rankme"] > 0.8 * untrained["rankme"]
    assert "warning" not in done.out


def test_dimensional_collapse_is_warned_of_by_rank_while_the_loss_falls(train: "Trainer") -> None:
    """Far too high a rate, and a target that follows at once: nothing but the rank tells."""
    done = train(
        *REAL[:-2],
        "run.report=true",
        "run.log_every=10",
        "run.save_every=1000",
        "optim.steps=60",
        "optim.lr=1e-2",
        "optim.warmup_epochs=0",
        "optim.momentum=0.9",
        "optim.final_momentum=0.9",
    ).check()
    first, last = train.rows[0], train.rows[-1]
    # Seen: the loss .58 -> .14, token_rankme 25 -> 6, target_std .76 -> .56, which is a healthy one.
    assert last["loss"] < 0.5 * first["loss"]
    assert last["token_rankme"] < 0.5 * first["token_rankme"]
    assert last["target_std"] > 0.3
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert re.match(r"warning: step \d+: the target uses few dimensions \(token_rankme ", warnings[0])
    assert len(warnings) <= 2  # the second at the fourth log line
    assert all(re.search(r"and since step \d+: the target uses few", line) for line in warnings[1:])


def test_collapse_is_warned_of_though_the_loss_is_low(train: "Trainer") -> None:
    """Weights of N(0, .02) in so narrow a network give a target little to say; a high rate does the rest."""
    done = train(
        *REAL,
        "run.report=true",
        "optim.steps=150",
        "optim.global_batch=32",
        "model.init=published",
        "optim.lr=3e-3",
        "optim.warmup_epochs=0.1",
        "optim.momentum=0.9",
    ).check()
    last = train.rows[-1]
    assert last["loss"] < 0.01
    assert last["target_std"] < 0.1
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert re.match(r"warning: step \d+: the target (uses few dimensions|says nearly the same)", warnings[0])
    assert len(warnings) <= 2
    assert f"target_std {last['target_std']:.3f}" in (train.run / "report" / "index.html").read_text()
