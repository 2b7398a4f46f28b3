"""A picture of what happened: `python -m training.report RUN [RUN …]` draws losses of runs side by side."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.png"
# The grey line is a mean over this part of the run, or single steps would hide the course.
SMOOTHING_PART = 0.02


def read_metrics(run_dir: Path | str) -> list[dict]:
    """The lines of a run's metrics, in order. A last line cut short by a kill is left out.

    Raises:
        ValueError: there is no such file, it holds no metrics, or a line before the last is damaged.
    """
    path = Path(run_dir, METRICS_FILE)
    if not path.exists():
        raise ValueError(
            f"{run_dir} has no {METRICS_FILE}; give the folder of a run, such as artifacts/runs/demo"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON ({error}); remove the line") from error
    if not metrics:
        raise ValueError(f"{path} is empty: no step has been logged yet")
    return metrics


def draw_losses(run_dirs: Sequence[Path | str], picture: Path | str) -> Path:
    """Training and validation loss in nats per token over tokens seen, one colour a run, as a PNG.

    Raises:
        ValueError: as `read_metrics`.
    """
    runs = {str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), dpi=140, layout="constrained")
    for colour, (name, metrics) in enumerate(runs.items()):
        trained = [line for line in metrics if line.get("loss") is not None]
        validated = [line for line in metrics if line.get("validation_loss") is not None]
        window = max(1, int(SMOOTHING_PART * len(trained)))
        losses = [line["loss"] for line in trained]
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1))
            for i in range(len(losses))
        ]
        label = Path(name).name
        axes.plot(
            [line["tokens"] for line in trained],
            smooth,
            color=f"C{colour}",
            alpha=0.45,
            label=f"{label}, training",
        )
        axes.plot(
            [line["tokens"] for line in validated],
            [line["validation_loss"] for line in validated],
            color=f"C{colour}",
            marker="o",
            markersize=4,
            label=f"{label}, validation",
        )
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats/token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Software": None})
    pyplot.close(figure)
    return Path(picture)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--output", help=f"the picture's file; {PICTURE_FILE} in the first run if not given")
    arguments = parser.parse_args(argv)
    try:
        print(draw_losses(arguments.runs, arguments.output or Path(arguments.runs[0], PICTURE_FILE)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
