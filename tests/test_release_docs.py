"""Every command of docs/release.md is run as it stands, on a small run, or says why it is not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from release.verify import CONSUMERS
from tests.test_release_export import write_export

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!--[^>]*-->\n)?```bash\n(.*?)```", DOCUMENT, re.DOTALL)
LINES = [
    (command, command.partition(" #")[0].strip())
    for excuse, text in BLOCKS
    if not excuse.startswith("<!-- not run by the tests: ")
    for command in text.strip().splitlines()
]


@pytest.mark.slow
def test_every_command_of_the_document_works(tmp_path):
    run = tmp_path / "artifacts" / "runs" / "demo"
    write_export(run / "export")
    (run / "settings.yaml").write_text("seed: 1\n")
    steps = [{"step": n, "tokens": 10 * n, "loss": 5.0 - n, "validation_loss": 4.5} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert len(LINES) == 9
    tables = []
    for line, command in LINES:
        arguments = command.split()
        assert arguments[0] == "python", line
        done = subprocess.run(
            [sys.executable, *arguments[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, line + done.stdout + done.stderr[-3000:]
        tables.append(done.stdout)
    for name in CONSUMERS:
        assert re.search(rf"^{re.escape(name)} +(ok|not installed)", tables[0], re.MULTILINE), tables[0]
        assert re.search(rf"^\| `{re.escape(name)}` \|", DOCUMENT, re.MULTILINE), f"{name} is not documented"
    assert len(tables[1].splitlines()) == 3  # the header and the two that were asked for
    card = (run / "export" / "README.md").read_text()
    assert "license: apache-2.0" in card and "![Training and validation loss](loss.png)" in card
    made = sorted(path.name for path in (tmp_path / "artifacts").iterdir())
    assert made == ["demo-int4", "demo-int8", "demo-onnx", "demo-stock", "demo.gguf", "runs"]
