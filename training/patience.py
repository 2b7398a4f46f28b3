"""The best weights of a run: when no better ones come any more, and getting them back at the end."""

import json
import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from training.checkpoint import WEIGHTS_FILE, TrainState, best_checkpoint
from training.run_directory import METRICS_FILE
from training.weights import bare_model, load_weights


class Patience:
    """Counts validations without a better loss, over all starts of a run.

    What came before is read from the run's metrics, which a resumed run has cut to its checkpoint; so the
    count is that of an unbroken run. Validation losses are equal on all processes to the last bit, and so
    are the conclusions.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, evaluations: int):
        """`evaluations` in a row without a better loss are the end; 0: there is none."""
        self._evaluations = evaluations
        self.best_loss = math.inf
        self._without_better = 0
        earlier = [_validation_losses(run_dir) if accelerator.is_main_process else []]
        for loss in broadcast_object_list(earlier)[0]:
            self.improves(loss)

    def improves(self, loss: float) -> bool:
        """Take note of a validation's loss; whether it is the lowest so far."""
        is_better = loss < self.best_loss
        self._without_better = 0 if is_better else self._without_better + 1
        self.best_loss = min(self.best_loss, loss)
        return is_better

    @property
    def is_over(self) -> bool:
        """Whether the run should end now."""
        return 0 < self._evaluations <= self._without_better


def _validation_losses(run_dir: Path) -> list[float]:
    """In their order; NaN for one that was not finite."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return [math.nan if loss is None else loss for loss in losses]


def restore_best_weights(accelerator: Accelerator, run_dir: Path, state: TrainState) -> str:
    """Give the model the best checkpoint's weights, on every process; returns what was done, in words."""
    path = best_checkpoint(run_dir)
    if path is None:
        return "No checkpoint was saved right after a validation: the last weights are exported."
    load_weights(bare_model(accelerator, state.model), load_file(path / WEIGHTS_FILE))
    return f"The export holds the weights of {path.name}, whose validation loss is the lowest."
