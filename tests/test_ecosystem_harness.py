"""EleutherAI's harness opens a bare checkpoint folder in a process that has never seen our repository."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM

TEXTS = ["The torch burns low and the corridor turns north.", "A dragon sleeps on a heap of copper coins."]

ROLLING_TASK = """
task: our_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""

CHOICE_TASK = """
task: our_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: [" yes", " no indeed"]
metric_list: [{metric: acc}]
"""


def log_likelihood(model, ids):
    """Nats of a row of ids, each predicted from those before it."""
    with torch.no_grad():
        logits = model(ids.unsqueeze(0)).logits[0, :-1]
    return -F.cross_entropy(logits, ids[1:], reduction="sum").item()


@pytest.mark.slow
def test_lm_eval_scores_a_bare_folder_as_we_do(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    tokenizer = train_tokenizer(TEXTS * 10, 300)
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", vocab_size=len(tokenizer))
    config.initializer_range = 0.1  # far from uniform, so that a wrong score would differ
    model = GPTScratchForCausalLM(config).eval()
    folder = tmp_path / "export"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, task in (("rolling", ROLLING_TASK), ("choice", CHOICE_TASK)):
        (tasks / f"{name}.yaml").write_text(task.replace("DATA", str(data)))

    # Another working directory, caches of its own, and nothing of ours on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tasks), "--tasks", "our_rolling,our_choice"]
    command += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    # Rolling scores put one end-of-text token before each text.
    start = torch.tensor([tokenizer.eos_token_id])
    rows = [torch.cat([start, torch.tensor(tokenizer(text)["input_ids"])]) for text in TEXTS]
    bits = -sum(log_likelihood(model, row) for row in rows) / math.log(2)
    expected = bits / sum(len(text.encode()) for text in TEXTS)
    # The harness pads the shorter text; float32 sums in another order.
    assert found["our_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)

    right = 0
    for text in TEXTS:
        context = torch.tensor(tokenizer(text)["input_ids"])
        scores = []
        for ending in (" yes", " no indeed"):
            whole = torch.tensor(tokenizer(text + ending)["input_ids"])
            scores.append(log_likelihood(model, whole) - log_likelihood(model, context))
        right += scores[0] > scores[1]
    assert found["our_choice"]["acc,none"] == right / len(TEXTS)
