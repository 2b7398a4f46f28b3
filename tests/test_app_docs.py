"""docs/page.md: its commands work as they stand, and its pictures are of this page."""

import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from tests.app_pictures import take_pictures
from tests.app_toys import CHROMIUM, PHONE, ROOT, served, write_writer
from tests.training_toys import environment

DOCUMENT = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!--[^>]*-->\n)?```bash\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for excuse, text in BLOCKS
    if not excuse.startswith("<!-- not run by the tests")
    for line in text.strip().splitlines()
]
LARGEST_PICTURE_BYTES = 200_000


def test_the_pictures_are_there_and_small():
    shown = set(re.findall(r"!\[[^]]+\]\((images/[\w-]+\.png)\)", DOCUMENT))
    assert shown == {
        f"images/{kind}-{scheme}.png" for kind in ("phone", "desktop") for scheme in ("light", "dark")
    }
    for name in shown:
        path = ROOT / "docs" / name
        assert path.stat().st_size < LARGEST_PICTURE_BYTES
        assert Image.open(path).width == 2 * (PHONE["width"] if "phone" in name else 1280)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_pictures_can_be_taken_again(tmp_path):
    pytest.importorskip("playwright", reason="the browser is driven by playwright")
    paths = take_pictures(str(write_writer(tmp_path / "export", ends=True)), tmp_path / "images")
    assert len(paths) == 4
    for path in paths:
        shades = Image.open(path).convert("L").histogram()
        # Paper by day, the dark by night: most of each is one of the two.
        assert (sum(shades[128:]) > sum(shades[:128])) == ("light" in path.name), path


@pytest.mark.slow
def test_every_command_of_the_document_works(tmp_path):
    assert [command[:3] for command in COMMANDS] == [
        ["python", "app.py"],
        ["python", "app.py", "--model"],
        ["python", "-m", "space.assemble"],
    ]
    write_writer(tmp_path / "artifacts" / "runs" / "dungeons" / "export")
    for command in COMMANDS[:2]:
        arguments = [str(ROOT / "app.py"), *command[2:]]
        if "--port" in arguments:  # whichever is free here
            del arguments[arguments.index("--port") :]
        with served(tmp_path / "log", command=arguments) as (_, process):
            assert process.poll() is None
    arguments = [sys.executable, *COMMANDS[2][1:]]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifacts" / "map-key" / "export" / "model.safetensors").exists()
    assert "hf upload" in done.stdout
