"""Every command and snippet of the documents is run as it stands, by this or a neighbouring test, or says why
it is not.

README.md is run by test_readme.py, docs/release.md by test_release_docs.py, docs/page.md by test_app_docs.py.
The others run here, cards of a dataset and a metric among them, in a clone whose demo recipe is a small one:
the same commands in seconds.
"""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training_toys import ROOT, TOY_SETTINGS, environment
from training.recipe import TrainSettings

FENCE = re.compile(r"(<!--[^>]*-->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
RUN_HERE = (
    *(f"docs/{name}.md" for name in ("quickstart", "data", "formats", "training", "dungeons")),
    "data/corpora/dungeons/README.md",
    "evaluation/metrics/hellaswag/README.md",
)
RUN_ELSEWHERE = ("README.md", "docs/release.md", "docs/page.md")
IMPORTS = "import datasets, pyarrow\n"  # which the lines of formats.md take for granted


def documents() -> list[Path]:
    """Every Markdown file of the repository; cards of a dataset, a metric and a Space are among them."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(path):
    """(language, text) of what is not excused."""
    for excuse, language, text in FENCE.findall(path.read_text(encoding="utf-8")):
        if not excuse.startswith("<!-- not run by the tests: "):
            yield language, text


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_what_a_document_tells_people_to_run_is_run_or_says_why_not(path):
    left = [text for _, text in fences(path)]
    assert name_of(path) in (*RUN_HERE, *RUN_ELSEWHERE) or not left, f"nothing runs {left}"
    for excuse, _, text in FENCE.findall(path.read_text(encoding="utf-8")):
        if "the same as in README.md" in excuse:
            readme = (ROOT / "README.md").read_text(encoding="utf-8")
            for line in text.strip().splitlines():
                assert line in readme, f"{path.name}: README.md has no {line!r}"


def test_settings_that_documents_show_exist():
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    for path in documents():
        for text in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            assert set(yaml.safe_load(text)) <= names, path.name


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A checkout with a small demo, what the documents take for granted, and the demo's run."""
    clone = tmp_path_factory.mktemp("documents") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    recipe = {**TOY_SETTINGS, "batch_tokens": 8192, "micro_batch_size": 16, "source": "docs"}
    recipe |= {"shards": "artifacts/shards/toy", "train_tokenizer": 400, "run_dir": "artifacts/runs/demo"}
    recipe |= {"block_size": 512, "save_every_steps": 20}  # 512: most bundled rooms fit
    (clone / "recipes" / "demo.yaml").write_text(yaml.safe_dump(recipe))
    rooms = {**yaml.safe_load((clone / "recipes" / "dungeons_demo.yaml").read_text(encoding="utf-8"))}
    rooms |= {"max_steps": 4, "warmup_steps": 1, "mixed_precision": "no", "sample_prompts": ["Description:"]}
    rooms |= {"eval_every_steps": 4, "eval_tokens": 4096, "sample_every_steps": 4, "sample_tokens": 4}
    rooms |= {"early_stopping_evaluations": 0}
    (clone / "recipes" / "dungeons_demo.yaml").write_text(yaml.safe_dump(rooms))
    (clone / "texts").mkdir()
    with gzip.open(clone / "texts" / "some.jsonl.gz", "wt") as file:
        for path in documents():
            for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
                file.write(json.dumps({"body": paragraph}) + "\n")
    room = {"name": "Cell", "text": "A wet cell. The straw is fresh, and nobody has slept on it."}
    (clone / "my_rooms.jsonl").write_text(json.dumps(room) + "\n")
    (clone / "notes.txt").write_text(
        "A stair goes down to a door of slate.\n\nA well, dry since the flood.\n"
    )
    (clone / "worlds").mkdir()
    (clone / "worlds" / "midgaard.wld").write_text(
        "#1\nThe Square~\nCarts stand here, and one of them is burning without any smoke.\n~\n0 0 0\nS\n$~\n"
    )
    run(clone, "bash", "accelerate launch train_accelerate.py")
    return clone


def run(clone, language, text, folder="."):
    variables = {
        **environment(),
        "PYTHONPATH": str(clone),
        "HF_DATASETS_CACHE": str(clone / "datasets-cache"),
    }
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(
        command, cwd=clone / folder, env=variables, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_HERE)
def test_every_command_of_a_document_works(clone, name):
    said = ""
    if name.startswith("evaluation/metrics"):
        pytest.importorskip("evaluate", reason="evaluate is not installed")
    for language, text in fences(ROOT / name):
        in_shards = name == "docs/formats.md"
        said += run(
            clone,
            language,
            IMPORTS + text if in_shards else text,
            folder="artifacts/shards/toy" if in_shards else ".",
        )
    wanted = {
        "docs/data.md": "duplicates",
        "docs/training.md": "side_by_side",
        "docs/dungeons.md": "rooms to ask",
    }
    assert wanted.get(name, "") in said, said[-3000:]
