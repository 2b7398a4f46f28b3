"""How fast a run goes, and showing it."""

import sys
import time

from tqdm import tqdm

# Without a terminal there is no bar; a line this often keeps a log file readable.
SECONDS_BETWEEN_LINES = 10.0


class Stopwatch:
    """Tokens per second of training alone.

    What is spent on validation, samples and checkpoints is left out.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Call when training goes on."""
        self._began = time.perf_counter()

    def tokens_per_second(self, tokens: int) -> float:
        """Of `tokens` since the last `restart`. Only right after the device has been waited for."""
        return tokens / max(time.perf_counter() - self._began, 1e-9)


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere; silent where `is_shown` is false."""

    def __init__(self, *, step: int, max_steps: int, is_shown: bool):
        self._is_shown = is_shown
        self._max_steps = max_steps
        self._last_line = 0.0
        self._bar = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def show(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """The newest numbers of training."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tok/s"
            )
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(
                f"step {step:,} of {self._max_steps:,}: loss {loss:.4f}, learning rate {learning_rate:.2e}, "
                f"{tokens_per_second:,.0f} tokens/s"
            )

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self._is_shown:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
