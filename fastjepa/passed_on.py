"""The `deepspeed` section of a configuration: which keys may be there, and which of them change results."""

from collections.abc import Mapping
from typing import Any

# Those that only tell, and those that only say where and in which pieces the same sums are taken. All others
# are held to change results.
_TELLING = (
    "steps_per_print wall_clock_breakdown dump_state memory_breakdown flops_profiler comms_logger "
    "monitor_config tensorboard wandb csv_monitor comet aio"
)
_CUTTING = (
    "allgather_bucket_size allgather_partitions reduce_bucket_size reduce_scatter overlap_comm "
    "contiguous_gradients round_robin_gradients sub_group_size stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_prefetch_bucket_size offload_optimizer offload_param"
)
# What the rest of the file says, and the section may not say otherwise.
_OURS_ALONE = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "optim.global_batch and speed.accumulation",
    "gradient_accumulation_steps": "speed.accumulation",
    "gradient_clipping": "optim.clip_grad",
    "zero_optimization.stage": "speed.zero_stage",
    "bf16.enabled": "optim.precision",
    # Without these DeepSpeed would step with gradients that are not finite.
    "bf16.check_grad_overflow": "run.max_bad_steps",
    "zero_optimization.compute_grad_norm": "run.max_bad_steps",
    "fp16": "optim.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}
# With these the weights are in more places, or in other forms, than checkpoints are loaded into.
_UNKNOWN_HERE = (
    "zero_optimization.zero_hpz_partition_size zero_optimization.mics_shard_size "
    "zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_nontrainable_weights amp "
    "compression_training hybrid_engine tensor_parallel torch_autocast weight_quantization"
)


def refusal(section: Mapping[str, Any]) -> str | None:
    """Why a section cannot be passed on; None if it can."""
    for key, ours in _OURS_ALONE.items():
        if _has(section, key):
            return f"deepspeed.{key} is set through {ours} here"
    for key in _UNKNOWN_HERE.split():
        if _has(section, key):
            return (
                f"deepspeed.{key} is not supported: DeepSpeed would hold weights that checkpoints are not "
                "loaded into, and a resumed run would not be the same. Leave it out"
            )
    return None


def _has(section: Mapping[str, Any], key: str) -> bool:
    outer, _, inner = key.partition(".")
    given = section.get(outer)
    return given is not None and (not inner or (isinstance(given, dict) and inner in given))


def deciding(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section may change results."""
    found = {name: value for name, value in section.items() if name not in _TELLING.split()}
    zero = found.get("zero_optimization")
    if isinstance(zero, dict):
        found["zero_optimization"] = {k: v for k, v in zero.items() if k not in _CUTTING.split()}
        if not found["zero_optimization"]:
            del found["zero_optimization"]
    return found
