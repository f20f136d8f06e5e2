"""What befell a run besides training, as its rows tell: spikes, steps that were skipped, divergence."""

from fastjepa.report.load import Metrics


def events(metrics: Metrics) -> list[str]:
    """A sentence for each, in order of the steps; at last what goes on still."""
    said = [_spike(row) for row in metrics if "spike_step" in row]
    trained = [row for row in metrics if "elapsed_s" in row]  # others are of judgements
    if not trained:
        return said
    last = trained[-1]
    if skipped := last.get("skipped_steps"):
        said.append(
            f"In {skipped:,.0f} of {last['step']:,.0f} steps the gradients were not finite, and the weights "
            "stayed as they were."
        )
    # JSON has no NaN: a measure that is not finite is left out of its row.
    if "loss" not in last and any("loss" in row for row in trained):
        sound = max(row["step"] for row in trained if "loss" in row)
        said.append(
            f"The run has diverged: its loss is not finite at step {last['step']:,.0f}; the last that was is "
            f"of step {sound:,.0f}. A lower optim.lr, a longer warm-up or optim.clip_grad may help."
        )
    return said


def _spike(row: dict[str, float]) -> str:
    to = f"to {row['spike_loss']:.3g}" if "spike_loss" in row else "beyond all numbers"
    usual = f" from {row['usual_loss']:.3g}" if "usual_loss" in row else ""
    what = f"The loss rose{usual} {to} at step {row['spike_step']:,.0f}"
    if row["step"] >= row["spike_step"]:
        return f"{what}, and the run went on."
    return (
        f"{what}: the run went back to step {row['step']:,.0f} and on with other data. The curves show only "
        "what came after."
    )
