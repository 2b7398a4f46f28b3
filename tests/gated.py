"""Programs whose model waits for the test: `python -m tests.gated FOLDER SCRIPT arguments…`.

Not a mock: script, model and weights are the real ones, in a process of their own. Before each forward the
model asks a file in FOLDER whether it may go on, so that a test decides what a clock would decide otherwise.
"""

import contextlib
import functools
import json
import runpy
import sys
import threading
import time
from pathlib import Path

PAUSE_SECONDS = 0.01


class Gate:
    """The test's side of it. Open at first; counts are of the whole process."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder

    def close(self) -> None:
        """Every forward waits from now on."""
        self._write("limit", "0")

    def let(self, forwards: int) -> None:
        """So many more forwards; the gate was closed before."""
        self._write("limit", str(len(self.forwards) + forwards))

    def let_until(self, condition) -> None:
        """Forwards one by one until it holds."""
        while not condition():
            self.let(1)
            time.sleep(2 * PAUSE_SECONDS)

    def open(self) -> None:
        (self.folder / "limit").unlink(missing_ok=True)

    @contextlib.contextmanager
    def closed(self):
        """Closed at first, and open in the end, whatever happens: nobody may wait for ever."""
        self.close()
        try:
            yield self
        finally:
            self.open()

    @contextlib.contextmanager
    def having(self, what: str):
        """With "loading", a model that is built waits in the middle of it; with "failure", forwards fail."""
        self._write(what, "")
        try:
            yield
        finally:
            (self.folder / what).unlink()

    @property
    def waiting(self) -> int:
        """Threads that stand before the gate."""
        path = self.folder / "waiting"
        return int(path.read_text() or 0) if path.exists() else 0

    @property
    def forwards(self) -> list[dict[str, int]]:
        """`rows` of the batch and `texts` in them, of every forward so far."""
        path = self.folder / "forwards"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def _write(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}"
        temporary.write_text(text)
        temporary.replace(self.folder / name)


class Keeper:
    """The model's side."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.count, self.waiting = 0, 0

    def guard(self, model_class) -> None:
        build, forward = model_class.__init__, model_class.forward

        @functools.wraps(build)
        def waiting_build(model, *arguments, **more):
            while (self.folder / "loading").exists():
                time.sleep(PAUSE_SECONDS)
            build(model, *arguments, **more)

        @functools.wraps(forward)
        def waiting_forward(model, *arguments, **more):
            self.wait(more)
            if (self.folder / "failure").exists():
                raise MemoryError("of the device")
            return forward(model, *arguments, **more)

        model_class.__init__, model_class.forward = waiting_build, waiting_forward

    def wait(self, inputs) -> None:
        self.stand(+1)
        while not self.passes(inputs):
            time.sleep(PAUSE_SECONDS)
        self.stand(-1)

    def stand(self, more: int) -> None:
        with self.lock:
            self.waiting += more
            (self.folder / "waiting").write_text(str(self.waiting))

    def passes(self, inputs) -> bool:
        with self.lock, contextlib.suppress(FileNotFoundError):
            if self.count >= int((self.folder / "limit").read_text()):
                return False
        with self.lock, (self.folder / "forwards").open("a") as file:
            self.count += 1
            ids, borders = inputs["input_ids"], inputs.get("cu_seq_lens_q")
            # Continuous batching lays its texts one behind the other, in one row.
            texts = ids.shape[0] if borders is None else int((borders.diff() > 0).sum())
            file.write(json.dumps({"rows": ids.shape[0], "texts": texts}) + "\n")
        return True


def wait_until(condition, seconds: float = 300) -> None:
    """Until the condition holds: nothing is decided by how long that takes, but a hung test has to end."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    from transformers import GPT2LMHeadModel

    from modeling_gpt_scratch import GPTScratchForCausalLM

    folder, *sys.argv = sys.argv[1:]
    keeper = Keeper(Path(folder))
    for model_class in (GPT2LMHeadModel, GPTScratchForCausalLM):
        keeper.guard(model_class)
    runpy.run_path(sys.argv[0], run_name="__main__")
