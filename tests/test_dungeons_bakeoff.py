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
        "USD_PER_HOUR": 60,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "bakeoff.sh")],
        env=environment() | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table[2:]}
    assert len(cells) == 7  # people, the base, five ways
    for name, row in cells.items():
        if name == "held-out descriptions":
            continue
        bits, general = float(row[0]), float(row[4])
        assert 0 < bits < 8 and 0 < general < 16, name
    assert cells["no fine-tuning"][5] == "" and all(row[5] for name, row in cells.items() if "rooms" in name)
