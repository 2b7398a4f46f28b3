"""A model that is not there yet, not whole, fails, or is taken away: the page says so and goes on."""

import contextlib
import re
import shutil

import pytest

from tests.app_toys import (
    BUSY,
    CHROMIUM,
    chromium,
    fill,
    gated,
    served,
    set_number,
    texts,
    visit,
    write_writer,
    written,
)
from tests.gated import Gate

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


def test_a_visitor_is_told_what_the_model_is_at(tmp_path):
    """Loading; at the end of its context before the length that was asked for; failing in the middle."""
    gate, log = Gate(tmp_path / "gate"), tmp_path / "log"
    command = gated(gate, "--model", str(write_writer(tmp_path / "export")))

    def look(browser, loading):
        page = visit(browser, address, ready="The model is being loaded")
        fill(page, setting="sewer")
        set_number(page, "Length", 400)
        page.click("#write")  # who is impatient loses nothing
        loading.close()
        rooms = written(page, "Room 1 is written")
        assert len(rooms) == 3 and all(rooms)
        assert re.search(r"Cut off: of the model's 128 tokens \d+ were left", page.inner_text("#status"))

        with gate.closed():
            page.click("#write")
            gate.let(16)
            page.wait_for_function(BUSY)
            with gate.having("failure"):
                gate.open()
                said = page.wait_for_selector("#status [role=alert]")
                assert said.inner_text() == "The model failed (MemoryError). Try once more."
        assert texts(page)[0]  # what there was stays
        page.click("#write")
        assert all(written(page, "Room 3 is written"))
        assert page.said == []

    with contextlib.ExitStack() as loading:
        loading.enter_context(gate.having("loading"))
        with served(log, command=command) as (address, _), chromium() as see:
            see(look, loading)
    assert "Writing failed: MemoryError" in log.read_text() and "sewer" not in log.read_text()
