"""Every command of the README is run as it stands, in a fresh clone, or says why it is not."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!--[^>]*-->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)


def commands():
    """The README's shell commands and Python snippets that are not excused, in their order."""
    for excuse, language, text in BLOCKS:
        if excuse.startswith("<!-- not run by the tests: "):
            continue
        if language == "python":
            yield language, text
        else:
            for line in text.strip().splitlines():
                yield language, line.split("#")[0].strip() if " # " in line else line


def test_ci_runs_the_two_commands_that_set_everything_up():
    """The README test runs inside an installed environment, so the installing half is CI's."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ('-e ".[test]"', "\npytest || once_more\n"):
        assert command in script
    shell = [text for language, text in commands() if language == "bash"]
    assert [line.split("&&")[0].split() for line in shell[:2]] == [
        ["pip", "install", "-e", "."],
        ["pip", "install", "-e", '".[test]"'],
    ]


def test_the_fineweb_commands_name_the_folders_of_their_recipe():
    """They are not run, so nothing else would notice a folder spelled in two ways."""
    recipe = yaml.safe_load((ROOT / "recipes" / "gpt2_124m.yaml").read_text(encoding="utf-8"))
    assert f"--source {recipe['source']} " in README
    assert f"--output {recipe['shards']}\n" in README
    assert f"--model {recipe['run_dir']}/export\n" in README


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_works_in_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "texts").mkdir()
    with gzip.open(clone / "texts" / "some.jsonl.gz", "wt") as file:
        for path in sorted((clone / "docs").glob("*.md")) + sorted(clone.glob("*.md")):
            for paragraph in path.read_text(encoding="utf-8").split("\n\n") * 3:
                file.write(json.dumps({"body": f"{len(paragraph)} {paragraph}" * 3}) + "\n")

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    ran = []
    for language, command in commands():
        if language == "python":
            arguments = [sys.executable, "-c", command]
        else:
            command = command.split("&&")[-1].strip() if command.startswith("pip install") else command
            if command == "pytest":
                continue
            arguments = ["bash", "-c", command]
        result = subprocess.run(
            arguments, cwd=clone, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        ran.append((command, result.stdout + result.stderr))

    demo = dict(ran)["accelerate launch train_accelerate.py"]
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", demo)]
    # From guessing among 4,096 words (8.3 nats) to well below half of what is left above 3 nats.
    assert len(losses) >= 3 and losses[-1] < losses[0] < 8.3 and losses[-1] < 5.5
    assert "bits/byte" in demo and "tokens/s" in demo and "artifacts/runs/demo/export" in demo
    again = subprocess.run(
        ["accelerate", "launch", "train_accelerate.py"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "is complete" in again.stdout + again.stderr
    assert (clone / "artifacts" / "loss.png").stat().st_size > 10_000
    assert (clone / "artifacts" / "demo-gpt2" / "model.safetensors").exists()
