"""What happened in a run, as a page and a picture: `python -m training.report RUN [RUN …]`."""

import argparse
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from training.files import replace_file
from training.page import comparison_page, run_page
from training.record import read_run

PICTURE_FILE = "loss.png"
PAGE_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
# The grey line is a mean over this part of the run, or single steps would hide the course.
SMOOTHING_PART = 0.02


def write_page(run_dir: Path | str) -> Path:
    """Write RUN/report.html in one motion; a browser that has it open reads the old or the new one.

    Raises:
        ValueError: as `read_run`. OSError: if it cannot be written.
    """
    page = Path(run_dir, PAGE_FILE)
    replace_file(page, run_page(read_run(run_dir)).encode())
    return page


def write_comparison(run_dirs: Sequence[Path | str], page: Path) -> Path:
    """Several runs on one page. Errors as `write_page`."""
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_file(page, comparison_page([read_run(run_dir) for run_dir in run_dirs]).encode())
    return page


def draw_losses(run_dirs: Sequence[Path | str], picture: Path | str) -> Path:
    """Training and validation loss in nats per token over tokens seen, one colour a run, as a PNG.

    Raises:
        ValueError: as `read_run`.
    """
    runs = {str(run_dir): read_run(run_dir) for run_dir in run_dirs}
    from matplotlib.figure import Figure  # not pyplot, which would settle the backend of a whole program

    figure = Figure(figsize=(8, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    for colour, (name, run) in enumerate(runs.items()):
        trained, validated = run.with_number("loss"), run.with_number("validation_loss")
        window = max(1, int(SMOOTHING_PART * len(trained)))
        sums = list(accumulate((line["loss"] for line in trained), initial=0.0))
        smooth = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(trained) + 1)]
        label = Path(name).name
        axes.plot(
            [line["tokens"] for line in trained],
            smooth,
            color=f"C{colour}",
            alpha=0.45,
            label=f"{label}, training",
        )
        if validated:
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
    return Path(picture)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--output",
        help=f"the picture's file, and the comparison's beside it; {PICTURE_FILE} in the first run",
    )
    arguments = parser.parse_args(argv)
    first = Path(arguments.runs[0])
    try:
        picture = draw_losses(arguments.runs, arguments.output or first / PICTURE_FILE)
        if len(arguments.runs) == 1:
            page = write_page(first)
        else:
            beside = picture.with_suffix(".html") if arguments.output else first / COMPARISON_FILE
            page = write_comparison(arguments.runs, beside)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{picture}\n{page}")


if __name__ == "__main__":
    main()
