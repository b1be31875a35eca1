"""Pictures of runs."""

from collections.abc import Sequence
from pathlib import Path

from train.metrics import METRICS, read_metrics
from vision_scan.errors import UserError


def plot_runs(runs: Sequence[Path], path: Path, window: int = 20) -> None:
    """Draws the loss curves of runs into one picture: every step faintly, a running mean on top.

    Args:
        runs: output directories.
        path: the picture; its suffix decides the format.
        window: steps in the running mean.
    Raises:
        UserError: if a run has no records, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib: pip install 'cobra-vlm[eval]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        records = read_metrics(run)
        if not records:
            raise UserError(f"{run} has no records ({METRICS} is missing or empty)")
        steps = [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        means = [
            sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)
            for i in range(len(losses))
        ]
        (line,) = axes.plot(steps, means, label=str(run))
        axes.plot(steps, losses, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=150)
