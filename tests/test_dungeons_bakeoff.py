"""The bake-off runs from one command, and its table has a row for each way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toys import ROOT, environment

from data.dungeon_files import BUNDLED_DUNGEONS, read_json_lines
from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM


def seconds_of(metrics):
    return max(json.loads(line).get("elapsed_seconds", 0) for line in metrics.read_text().splitlines())


def read_table(path):
    """{row's name: {head of a column: cell}} of a Markdown table."""
    heads, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()
    )
    return {name: dict(zip(heads[1:], cells, strict=True)) for name, *cells in rows}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_bake_off_compares_every_way_at_toy_size(tmp_path):
    rooms = read_json_lines(BUNDLED_DUNGEONS / "train.jsonl")
    tokenizer = train_tokenizer((room.description for room in rooms), 2000)
    torch.manual_seed(0)
    ends = {"bos_token_id": 1999, "eos_token_id": 1999}
    config = GPTScratchConfig(vocab_size=2000, n_layer=1, n_head=2, n_embd=16, n_positions=512, **ends)
    GPTScratchForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    other = [{"text": f"A cellar with {n} barrels of old rain in it.", "title": None} for n in range(30)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    (tmp_path / "general.txt").write_text("Some other text, about nothing that matters here. " * 30)
    flags = f"--batch_tokens 1024 --micro_batch_size 2 --warmup_steps 1 --cpu_threads 1 --sample_tokens 2 \
        --eval_tokens 2048 --compile none --general_data {tmp_path / 'general.txt'} --save_every_minutes 0"
    settings = {
        "BASE": tmp_path / "base",
        "OUT": tmp_path / "out",
        "OTHER": tmp_path / "other.jsonl",
        "STEPS": 2,
        "WRITE": 4,
        "ROOMS": 4,
        "NEW_TOKENS": 8,
        "FLAGS": flags,
        "USD_PER_HOUR": 6000,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def bake(**changes):
        return subprocess.run(
            ["bash", str(ROOT / "recipes" / "bakeoff.sh")],
            env=environment() | {name: str(value) for name, value in {**settings, **changes}.items()},
            capture_output=True,
            text=True,
            timeout=550,
        )

    done = bake()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cells = read_table(tmp_path / "out" / "table.md")
    assert len(cells) == 7  # the descriptions themselves, the base, five ways
    descriptions = cells.pop("held-out descriptions")
    assert descriptions["things"] == "1.00" and not descriptions["USD"] and not descriptions["bits/byte"]
    base = cells.pop("no fine-tuning")
    assert not base["minutes"] and not base["USD"] and 0 < float(base["general text"]) < 16
    for name, row in cells.items():
        assert 0 < float(row["bits/byte"]) < 8 and 0 < float(row["general text"]) < 16, name
        assert 0 <= float(row["things"]) <= 1 and float(row["USD"]) > 0, name
    took = {
        "all weights, bundled rooms": ["bundled/metrics.jsonl"],
        f"distilled from {tmp_path}": ["distill/metrics.jsonl", "other/metrics.jsonl"],
        "written by": ["sequence/metrics.jsonl", "other/metrics.jsonl", "written.metrics.jsonl"],
    }
    for (
        part,
        files,
    ) in took.items():  # with the teacher's minutes and its writing, at a hundred dollars a minute
        (row,) = (row for name, row in cells.items() if part in name)
        seconds = [seconds_of(tmp_path / "out" / file) for file in files]
        assert float(row["USD"]) == pytest.approx(sum(seconds) / 60 * 100, abs=0.001), part

    changed = bake(STEPS=3)  # a table of two budgets
    assert changed.returncode == 1 and "begun with other settings" in changed.stderr
    assert "STEPS=2" in changed.stderr and "STEPS=3" in changed.stderr
    again = bake(USD_PER_HOUR="")  # nothing is trained again, and no price is made up
    assert again.returncode == 0 and "learning rate" not in again.stdout, again.stdout + again.stderr
    assert not any(row["USD"] for row in read_table(tmp_path / "out" / "table.md").values())
