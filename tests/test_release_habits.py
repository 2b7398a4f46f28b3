"""What a release needs around its code: one version, papers in order, wheel and sdist that install."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

import modeling_gpt_scratch
from tests.declared import link_packages

# What runs code that lies in a file of data.
FORBIDDEN = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("yaml", "load"), ("os", "system")}
ROOT = Path(__file__).resolve().parent.parent
VERSION = modeling_gpt_scratch.__version__


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_one_place_and_the_papers_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert 'version = { attr = "modeling_gpt_scratch.__version__" }' in read("pyproject.toml")
    assert yaml.safe_load(read("CITATION.cff"))["version"] == VERSION
    assert re.findall(r"^## (\d\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == VERSION


def test_the_citation_has_what_the_format_demands():
    """cff-version 1.2.0: https://github.com/citation-file-format/citation-file-format."""
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_every_script_that_can_run_foreign_code_has_to_be_told_to():
    """SECURITY.md promises it."""
    folders = ("data", "training", "evaluation", "modeling_gpt_scratch", "release", "space", "benchmarks")
    sources = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    sources += sorted(ROOT.glob("*.py"))
    assert len(sources) > 100
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or node.value.value is False, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in FORBIDDEN, path


@pytest.mark.slow
def test_wheel_and_sdist_install_and_import_in_a_clean_environment(tmp_path):
    """The dependencies are this environment's, by a .pth file; of its packages those that are declared.

    The scripts of the checkout run on them too: `pip install -e .` is all that the main job asks for.
    """
    pytest.importorskip("build", reason="build is not installed")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    # The sdist from the checkout, then the wheel from the sdist.
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = built.stdout + built.stderr
    if re.search(r"No matching distribution|Could not find a version|ConnectionError", said):
        pytest.skip("no package index to fetch setuptools from")
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    assert f"-{VERSION}-" in wheel.name and sdist.name == f"gpt_scratch-{VERSION}.tar.gz"
    inside = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in inside} == {
        "modeling_gpt_scratch",
        f"gpt_scratch-{VERSION}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "modeling_gpt_scratch/__init__.py"} <= names

    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True)
    python = clean / "bin" / "python"
    for package in (wheel, sdist):
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        install += ["--force-reinstall", str(package)]
        done = subprocess.run(install, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (own,) = (clean / "lib").glob("python*/site-packages")
        declared = Distribution.at(own / f"gpt_scratch-{VERSION}.dist-info").requires or []
        links = link_packages(declared, tmp_path / f"declared by {package.name}")
        (own / "dependencies.pth").write_text(f"{links}\n")
        program = (
            "import modeling_gpt_scratch as m; "
            "print(m.__file__, m.__version__, m.GPTScratchConfig.preset('tiny').n_layer)"
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found = subprocess.run(
            [str(python), "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.split() == [str(own / "modeling_gpt_scratch" / "__init__.py"), VERSION, "2"]

    scripts = ["train_accelerate", "finetune", "eval_hellaswag", "eval_dungeons", "chat", "data.prepare"]
    for script in [*scripts, "release.export", "release.verify", "release.card", "release.push"]:
        helped = subprocess.run(
            [str(python), "-m", script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert helped.returncode == 0, f"{script}: {helped.stderr}"
