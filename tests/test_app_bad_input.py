"""A model that is not there, not whole, or taken away while it serves: the page says so and goes on."""

import shutil

import pytest

from tests.app_toys import CHROMIUM, chromium, fill, served, set_number, texts, visit, write_writer, written

pytest.importorskip("playwright", reason="the browser is driven by playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


def test_a_model_may_be_missing_then_broken_then_whole_then_gone(tmp_path):
    """One process serves through all of it; what a visitor typed stays where it is."""
    good = write_writer(tmp_path / "good")
    folder = tmp_path / "artifacts" / "runs" / "dungeons" / "export"  # the default

    def look(browser):
        page = visit(browser, address, ready="There is no model to write with")
        told = page.inner_text("#status")
        assert "artifacts/runs/dungeons/export is not a folder" in told
        assert "accelerate launch train_accelerate.py" in told and "accelerate launch finetune.py" in told
        fill(page, setting="sewer")
        set_number(page, "Seed", 3)
        set_number(page, "Length", 40)

        shutil.copytree(good, folder)
        (folder / "model.safetensors").unlink()
        (folder / "modeling_gpt_scratch.py").unlink()
        page.click("#write")
        told = written(page, "is not a whole export") or page.inner_text("#status")
        assert "model.safetensors is missing" in told and "modeling_gpt_scratch.py is missing" in told
        assert page.input_value("#field-setting input") == "sewer" and page.is_enabled("#write")

        shutil.copytree(good, folder, dirs_exist_ok=True)
        page.click("#write")
        rooms = written(page)
        assert len(rooms) == 3 and all(rooms)

        # Cut short in place first: who reads weights from the file itself dies of that.
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        shutil.rmtree(folder)
        page.click("#write")
        assert written(page, "Room 2 is written") == rooms
        other = visit(browser, address)
        other.click("#write")
        assert all(written(other)) and len(texts(other)) == 3
        assert page.said == [] and other.said == []

    log = tmp_path / "log"
    with served(log) as (address, process), chromium() as see:
        see(look)
        assert process.poll() is None
    assert "sewer" not in log.read_text() and "Traceback" not in log.read_text()
