"""The house stays small and its stairs go one way: import directions, file sizes, a true README tree."""

import ast
import itertools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_gpt_scratch", "data", "training", "evaluation", "release", "space")
# Who may import whom. Everything else at the root, and benchmarks, may import all packages.
ALLOWED = {
    "modeling_gpt_scratch": {"modeling_gpt_scratch"},
    "data": {"data"},
    "training": {"training"},
    "evaluation": {"evaluation", "data"},
    "release": {"release", "modeling_gpt_scratch"},
    "space": {"space", "release", "evaluation", "data", "modeling_gpt_scratch"},  # what app.py stands on
}
LINE_LIMITS = {
    "train_accelerate.py": 250,
    "finetune.py": 150,
    "eval_hellaswag.py": 100,
    "eval_dungeons.py": 150,
    # One file on purpose: the model is read bottom up.
    "modeling_gpt_scratch/modeling_gpt_scratch.py": 600,
}
DEFAULT_LINE_LIMIT = 400


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).exists()]


SOURCES = [name for name in tracked_files() if name.endswith(".py") and not name.startswith("tests/")]
SCRIPTS = {name.removesuffix(".py") for name in SOURCES if "/" not in name}


def imported_modules(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize("path", [name for name in SOURCES if name.split("/")[0] in PACKAGES])
def test_imports_go_down_the_stairs(path):
    package = path.split("/")[0]
    for module in imported_modules(path):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert top in ALLOWED[package], f"{path} imports {module}"
        assert top not in SCRIPTS or top in PACKAGES, f"{path} imports the script {module}"


@pytest.mark.parametrize("path", [name for name in SOURCES if "/" not in name])
def test_scripts_import_no_script_but_finetune_the_loop(path):
    for module in imported_modules(path):
        if module.split(".")[0] in SCRIPTS:
            assert (path, module) == ("finetune.py", "train_accelerate"), f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES)
def test_files_keep_to_their_size(path):
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    limit = LINE_LIMITS.get(path, DEFAULT_LINE_LIMIT)
    assert lines <= limit, f"{path} has {lines} lines; past {limit} it is asking to be two"


def test_the_model_package_is_all_that_pip_installs():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["modeling_gpt_scratch"]' in settings


def the_readmes_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The house\n.*?```\n(.*?)```", readme, re.DOTALL)
    assert tree, "README.md has no tree under '## The house'"
    return tree.group(1)


def entries_of_the_readmes_tree():
    """(path, what is said of it) of every file and folder that the tree has a line, or a part of one, for."""
    folders: list[str] = []  # in which the line stands
    for line in the_readmes_tree().splitlines():
        branch = re.fullmatch(r"((?:│   |    )*)[├└]── (.*)", line)
        if not branch:  # the root, or a line that goes on
            continue
        depth = len(branch[1]) // 4
        # Names stand apart from one another and from what is said of them by two blanks or more.
        words = re.split(r" {2,}", branch[2])
        names = list(itertools.takewhile(lambda word: re.fullmatch(r"[\w./-]+(/|\.\w+)", word), words))
        for name in names:
            yield "".join([*folders[:depth], name]), " ".join(words[len(names) :])
        folders[depth:] = names[:1]


def test_the_readmes_tree_names_every_file_that_a_reader_would_look_for():
    """By its path: of two files called settings.py, either could go unnamed."""
    entries = dict(entries_of_the_readmes_tree())
    for path in SOURCES:
        folder, _, name = path.rpartition("/")
        in_the_folders_line = name in entries.get(f"{folder}/", "") or name == f"{Path(folder).name}.py"
        assert (
            name == "__init__.py" or path in entries or (f"{folder}/" in entries and in_the_folders_line)
        ), f"{path} is missing from the README's tree"
    on_disk = set(tracked_files())
    on_disk |= {f"{parent}/" for path in on_disk for parent in map(str, Path(path).parents)}
    for path in entries.keys() - {"artifacts/"}:
        assert path in on_disk, f"the README's tree names {path}, which is not there"
    names = {Path(path).name for path in on_disk}
    for name in re.findall(r"[\w-]+\.(?:py|yaml|md|toml)\b", the_readmes_tree()):  # what is said of them, too
        assert name in names, f"the README's tree names {name}, which is not there"


def test_links_between_our_documents_lead_somewhere():
    for path in (name for name in tracked_files() if name.endswith(".md")):
        text = (ROOT / path).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert ((ROOT / path).parent / target).exists(), f"{path} links to {target}"
