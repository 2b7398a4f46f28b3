"""The folder that becomes a Space: whole, in step with the project, and running where nothing of ours is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from release.folder import ReleaseError
from space.assemble import assemble, main
from tests.app_toys import CHROMIUM, ROOT, chromium, served, set_number, visit, write_writer, written
from tests.declared import link_packages
from tests.training_toys import environment

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is not in Python 3.10


def requirements(text: str) -> dict[str, Requirement]:
    """What stands between quotes or alone on a line, and has a range."""
    found = re.findall(r'^(?:[^#\n]*")?([\w-]+>=[\d.]+(?:,<[\d.]+)?)', text, re.MULTILINE)
    return {one.name: one for one in map(Requirement, found)}


def test_the_space_asks_for_the_versions_that_the_project_asks_for():
    theirs = requirements((ROOT / "space" / "requirements.txt").read_text(encoding="utf-8"))
    ours = requirements(PROJECT)
    assert set(theirs) == {"torch", "transformers", "safetensors"}
    assert all(one.specifier == ours[name].specifier for name, one in theirs.items())
    card = SpaceCard.load(ROOT / "space" / "README.md").data
    assert card.sdk == "gradio" and card.sdk_version in ours["gradio"].specifier
    assert card.title and card.emoji and f'license = "{card.license}"' in PROJECT.lower()
    assert len(card.short_description) <= 60  # the Hub's limit


def test_a_model_of_the_hub_is_named_and_one_in_a_folder_goes_along(tmp_path):
    main([str(tmp_path / "named"), "--model", "user/name", "--trust_remote_code"])
    assert SpaceCard.load(tmp_path / "named" / "README.md").data.models == ["user/name"]
    assert "['--model', 'user/name', '--trust_remote_code']" in (tmp_path / "named" / "start.py").read_text()
    export = write_writer(tmp_path / "export")
    (export / "optimizer.safetensors").write_text("stays at home")
    assemble(tmp_path / "along", str(export))
    assert (tmp_path / "along" / "export" / "model.safetensors").exists()
    assert not (tmp_path / "along" / "export" / "optimizer.safetensors").exists()
    assert "['--model', 'export']" in (tmp_path / "along" / "start.py").read_text()
    assert not list((tmp_path / "along").rglob("__pycache__"))


def test_nothing_is_overwritten_and_no_broken_model_goes_out(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not an empty folder, and nothing is overwritten"):
        main([str(tmp_path / "mine"), "--model", "user/name"])
    export = write_writer(tmp_path / "export")
    (export / "config.json").unlink()
    with pytest.raises(ReleaseError, match=r"config\.json is missing"):
        assemble(tmp_path / "out", str(export))
    with pytest.raises(ReleaseError, match="is not a folder"):
        assemble(tmp_path / "out", "artifacts/runs/nowhere/export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_folder_runs_where_nothing_of_ours_is(tmp_path):
    pytest.importorskip("playwright", reason="the browser is driven by playwright")
    folder = tmp_path / "map-key"
    main([str(folder), "--model", str(write_writer(tmp_path / "export"))])
    files = "[getattr(module, '__file__', None) for module in sys.modules.values()]"
    show = f"import app, json, sys; print(json.dumps({files}))"
    # Of this environment the Space sees gradio, which is its own, and what its requirements.txt brings.
    asked = [line for line in (folder / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    packages = link_packages(["gradio", *asked], tmp_path / "packages")
    environ = {**environment(), "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", show],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    used = [Path(name) for name in json.loads(done.stdout.splitlines()[-1]) if name]
    assert not [file for file in used if file.is_relative_to(ROOT)], "something of the checkout was used"

    def look(browser):
        page = visit(browser, address, ready="export")
        set_number(page, "Length", 30)
        page.click("#dice")
        page.click("#write")
        assert len(written(page)) == 3 and page.said == [] and page.outside == []

    start = served(tmp_path / "log", command=["-S", "start.py"], cwd=folder, variables=environ)
    with start as (address, _), chromium() as see:
        see(look)
