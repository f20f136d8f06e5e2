"""What is changed in a documented command so that it can be run here in seconds, all of it in these tables.

Every command is run by the code that a user's shell would call. Nothing else than what stands here is
replaced, added or left out, and a command that no rule covers fails.
"""

import re
import shlex
from collections.abc import Sequence

# Names in the documentation that stand for something of the reader's, and what a test has instead.
STANDS_FOR = {
    "/shared/images": "images",  # photos of 60 x 40 pixels in two class folders
    "/images": "images",
    "/packed": "packed",
    "/shards/*.tar": "shards/*.tar",  # the same photos in a shard
    "/shared/runs/": "runs/",
    "step_00001000": "step_00000002",  # runs/NAME, runs/A and runs/B are runs of two steps
    "IN1K-vit.h.14-300e.pth.tar": "published.pth.tar",  # one of them in the published layout
    "encoder.pth.tar": "published.pth.tar",
}

# Laid over every training, last: the smallest model, few images, two steps; the report is the
# tutorial's, and trackers are of tests/engine/test_tracking.py.
SMALL_RUN = shlex.split("""
    model.size=free model.width=192 model.depth=4 model.heads=3 model.mlp_ratio=2 model.patch_size=4
    model.predictor_width=48 model.predictor_depth=1 model.predictor_heads=3
    model.decoder_width=16 model.decoder_depth=1 model.decoder_heads=2
    masks.context_tokens=null masks.min_keep=4 data.image_size=28 data.hold_out=8
    optim.epochs=null optim.steps=2 optim.global_batch=8 optim.warmup_epochs=0 optim.precision=fp32
    probe.every_steps=0 probe.bank=8 probe.queries=4 probe.final_bank=8 probe.final_queries=4
    speed.workers=0 speed.device=cpu speed.accumulation=1 speed.checkpoint_blocks=false
    run.save_every=1 run.keep_last=9 run.report=false run.track=[]
""")

# Added to other commands, by their first words.
ADDED = {
    "data stats": ["--workers", "1", "--images", "200"],
    "data pack": ["--workers", "1"],
    "probe": ["--train-images", "60", "--test-images", "40", "--protocol", "knn", "--k", "5", "--force"],
}

# What a value of an option becomes: 448 pixels are 12,544 patches of the smallest model.
OPTIONS = {("--image-size", "448"): "56", ("--nnodes", "2"): "1"}

# Not run, and why. Their options are parsed all the same.
PARSED_ONLY = {
    r"fastjepa doctor .*--config": "times a step of ViT-B: tests/diagnosis times small ones",
    r"fastjepa data index s3://": "needs a store: tests/data/shards reads one over HTTP",
    r"fastjepa probe .*--baseline": "needs weights from the network: tests/probe has files instead",
    r"fastjepa track": "sends what a run has to a service: tests/engine/test_tracking.py does it offline",
}

# Targets that take minutes, or need a GPU: only that make knows them and their settings.
TARGETS_WITHOUT_RUN = re.compile(
    r"setup|test|test-slow|faults|test-gpu|sanitize|lint|docs|aot|performance|scale-model|bench.*"
)


def stand_in(word: str) -> str:
    """A word with what is there instead of the reader's own."""
    for name, instead in STANDS_FOR.items():
        word = re.sub(rf"(^|[=:/]){re.escape(name)}", rf"\1{instead}", word)
    return word


def with_options(words: Sequence[str]) -> list[str]:
    """Words with the values of `OPTIONS`."""
    pairs = zip(["", *words], words, strict=False)
    return [OPTIONS.get((before, word), word) for before, word in pairs]


def why_not_run(command: str) -> str | None:
    return next((why for pattern, why in PARSED_ONLY.items() if re.match(pattern, command)), None)
