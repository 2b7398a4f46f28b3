"""`eval_hellaswag.py` and its files: resumed after a kill, never mixed, paired with the same questions."""

import copy
import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from tokenizers.processors import TemplateProcessing
from transformers import GPT2LMHeadModel

from data.hellaswag import origin
from data.tokenizer import gpt2_tokenizer
from evaluation.hellaswag import summarize
from evaluation.loading import identify
from evaluation.records import (
    append_scores,
    default_output,
    model_index,
    read_scores,
    resume_scores,
    score_and_keep,
    summary,
)
from tests.processes import ROOT, end, run, run_script, start
from tests.test_evaluation_hellaswag import QUESTIONS, accelerator, questions, tokenizer, wavy_gpt2

__all__ = ["accelerator", "questions", "tokenizer"]  # fixtures

SCRIPT = ROOT / "eval_hellaswag.py"

pytestmark = pytest.mark.filterwarnings("ignore:hellaswag.jsonl is not the official")


@pytest.fixture(scope="module")
def model():
    return wavy_gpt2()


def planted(path: Path) -> float:
    """Write a number into the first score of a file that no model would give, and say which."""
    header, first, *rest = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["log_probabilities"]["harness"][0] = -12345.0
    path.write_text("".join([header, json.dumps(row) + "\n", *rest]))
    return -12345.0


def test_what_is_there_is_not_scored_again_and_a_higher_limit_goes_on(
    tmp_path, model, tokenizer, questions, accelerator
):
    """More questions were once those of another set, and the file had to be deleted."""
    path = tmp_path / "results.jsonl"
    score_and_keep(path, model, tokenizer, questions[:3], accelerator)
    sentinel = planted(path)
    for count in (5, 3, 5):  # fewer again: only they count
        scored, scores = score_and_keep(path, model, tokenizer, questions[:count], accelerator)
        assert [score.index for score in scores] == list(range(count))
        assert [score.log_probabilities["harness"][0] for score in scores].count(sentinel) == 1
    assert len(path.read_text().splitlines()) == 1 + 5 and len(read_scores(path)[1]) == 5
    other = [dataclasses.replace(questions[0], label=3), *questions[1:]]
    with pytest.raises(ValueError, match=r"1 other questions, the first is number 0.*another --output"):
        resume_scores(path, {"dtype": "float32"}, other)
    assert scored["dtype"] == "float32"


@pytest.mark.parametrize("left", ["", '{"hellaswag_scores": {'])
def test_a_kill_before_or_in_the_first_line_is_no_obstacle(tmp_path, left, questions):
    """The file was once created empty; a later run then refused it. Now the first line comes whole or not at
    all: half of one only ever stands in a file beside it.
    """
    path = tmp_path / "new" / "results.jsonl"
    path.parent.mkdir()
    path.with_name("results.jsonl.new" if left else path.name).write_text(left)
    assert resume_scores(path, {"dtype": "float32"}, questions) == []
    assert read_scores(path) == ({"dtype": "float32"}, [])
    assert resume_scores(path, {"dtype": "float32"}, questions) == []


def test_a_torn_last_line_is_scored_again(tmp_path, model, tokenizer, questions, accelerator):
    path = tmp_path / "results.jsonl"
    _, scores = score_and_keep(path, model, tokenizer, questions[:3], accelerator)
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert len(resume_scores(path, {}, questions)) == 2
    append_scores(path, scores[:1])
    assert len(read_scores(path)[1]) == 3
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="does not hold HellaSwag scores"):
        read_scores(path)


def test_whatever_changes_scores_is_told_apart_and_nothing_else(tmp_path, model, tokenizer):
    """The configuration and all of the tokenizer but its vocabulary once went unnoticed."""
    known = identify(model, tokenizer)
    model.save_pretrained(tmp_path / "elsewhere")
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "elsewhere")
    used = type(tokenizer).from_pretrained(tmp_path / "elsewhere")
    used(["some text", "a longer text"], padding=False, truncation=True, max_length=3)
    assert identify(again, used) == known

    def differing(model, tokenizer):
        return {name for name, value in identify(model, tokenizer).items() if value != known[name]}

    other = copy.deepcopy(model)
    other.config.layer_norm_epsilon = 1e-3
    assert differing(other, tokenizer) == {"config_sha256"}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.ln_f.bias[0] += 1
    assert differing(other, tokenizer) == {"weights_sha256"}
    assert differing(copy.deepcopy(model).bfloat16(), tokenizer) == {"weights_sha256", "dtype"}
    adding = gpt2_tokenizer()
    end_id = adding.eos_token_id
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end_id)]
    )
    assert differing(model, adding) == {"tokenizer_sha256"}


def test_every_model_has_a_file_of_its_own_by_default():
    names = ["openai-community/gpt2", "artifacts/runs/demo/export", "/home/me/a model/", "../x/export"]
    outputs = [default_output(name) for name in names]
    assert outputs[0] == Path("artifacts/hellaswag/openai-community--gpt2.json")
    assert outputs[1].name == "artifacts--runs--demo--export.json"
    assert outputs[2].name == "home--me--a--model.json" and outputs[3].name == "x--export.json"


def test_a_card_that_takes_the_results_names_what_was_asked(
    tmp_path, model, tokenizer, questions, accelerator
):
    """They were once called Rowan/hellaswag's validation split whatever the questions were."""
    _, scores = score_and_keep(tmp_path / "r.jsonl", model, tokenizer, questions, accelerator)
    result = summarize(scores)
    index = model_index("a model", result, origin(str(QUESTIONS), "validation"))
    (tmp_path / "results.json").write_text(json.dumps({"model-index": index}))
    written = json.loads((tmp_path / "results.json").read_text())
    name, results = model_index_to_eval_results(written["model-index"])
    card = ModelCard.from_template(ModelCardData(model_name=name, eval_results=results), model_id="x")
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {one.metric_type: one.metric_value for one in read} == {
        metric: round(share.value, 4) for metric, share in result.accuracy.items()
    }
    assert {(one.dataset_type, one.dataset_name, one.dataset_split) for one in read} == {
        ("text", "HellaSwag questions of hellaswag.jsonl", None)
    }
    assert all(one.metric_args["questions"] == len(questions) for one in read)
    printed = summary("a model", "float32", result)
    assert f"a model: {len(questions)} questions, float32" in printed and "wikihow" in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, model):
    """Two models on disk, `one` and `other`."""
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "one")
    wavy_gpt2(n_layer=1).save_pretrained(folder / "other")
    for name in ("one", "other"):
        tokenizer.save_pretrained(folder / name)
    return folder


COMMON = ("--questions", str(QUESTIONS), "--dtype", "float32", "--batch_tokens", "800")


@pytest.mark.slow
def test_two_processes_a_resumed_run_and_one_whole_run_write_the_same(folder, tmp_path):
    arguments = ("--model", str(folder / "one"), *COMMON)
    printed = run_script(SCRIPT, *arguments, "--output", "one.json", cwd=tmp_path)
    assert "harness_acc_norm" in printed and "95% [" in printed
    run_script(SCRIPT, *arguments, "--output", "two.json", cwd=tmp_path, processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and one["questions"] == 16
    metric = one["model-index"][0]["results"][0]["metrics"][0]
    accuracy = one["accuracy"]["completion_acc"]["value"]
    assert (metric["type"], metric["value"]) == ("completion_acc", round(accuracy, 4))

    # Half the lines and a torn one, as a kill leaves them; on two processes, of which one reads the file.
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "three.jsonl").write_text("".join(lines[:9]) + lines[9][:30])
    sentinel = planted(tmp_path / "three.jsonl")
    three = ("--output", "three.json", "--baseline", "one.jsonl")
    printed = run_script(SCRIPT, *arguments, *three, cwd=tmp_path, processes=2)
    scores = {score.index: score for score in read_scores(tmp_path / "three.jsonl")[1]}
    before = {score.index: score for score in read_scores(tmp_path / "one.jsonl")[1]}
    sums = {index: score.log_probabilities["harness"] for index, score in before.items()}
    (kept,) = [index for index in before if scores[index].log_probabilities["harness"][0] == sentinel]
    sums[kept] = [sentinel, *sums[kept][1:]]
    for index, expected in sums.items():  # other batches, so up to rounding
        assert scores[index].log_probabilities["harness"] == pytest.approx(expected, rel=1e-4)
    assert len((tmp_path / "three.jsonl").read_text().splitlines()) == 1 + 16
    assert "against one.jsonl:" in printed


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_line(folder, tmp_path):
    """Really killed, with the signal that nothing can catch, in the middle of a thousand questions."""
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(rows[number % len(rows)]) + "\n" for number in range(1600)))
    command = ["--model", str(folder / "one"), "--questions", str(many), "--dtype", "float32"]
    command += ["--output", "killed.json", "--batch_tokens"]
    process = start([sys.executable, str(SCRIPT), *command, "1"], tmp_path)
    path = tmp_path / "killed.jsonl"
    try:
        while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < 4):
            time.sleep(0.01)
        process.kill()
    finally:
        end(process)
    assert not (tmp_path / "killed.json").exists()  # it did not get to its end
    _, before = read_scores(path)
    assert 3 <= len(before) < 1600
    sentinel = planted(path)
    run_script(SCRIPT, *command, "4000", cwd=tmp_path)
    scores = read_scores(path)[1]
    assert sorted(score.index for score in scores) == list(range(1600))
    assert [score.log_probabilities["harness"][0] for score in scores].count(sentinel) == 1
    assert json.loads((tmp_path / "killed.json").read_text())["questions"] == 1600


@pytest.mark.slow
def test_a_baseline_is_scored_or_read_and_says_how_it_differs(folder, tmp_path):
    arguments = ("--model", str(folder / "one"), *COMMON, "--output", "one.json")
    printed = run_script(SCRIPT, *arguments, "--baseline", str(folder / "other"), cwd=tmp_path)
    report = json.loads((tmp_path / "one.json").read_text())["baseline"]
    assert "against" in printed and "another dtype" not in printed
    paired = {metric: numbers for metric, numbers in report.items() if "_acc" in metric}
    assert len(paired) == 4 and all(0 <= numbers["p_value"] <= 1 for numbers in paired.values())
    assert sum(numbers["only_first"] + numbers["only_second"] for numbers in paired.values()) > 0
    assert report["dtype"] == "float32"

    left = next(tmp_path.glob("one-baseline-*.jsonl"))
    header, *lines = left.read_text().splitlines()
    told = json.loads(header)
    told["hellaswag_scores"]["dtype"] = "bfloat16"
    (tmp_path / "half.jsonl").write_text("\n".join([json.dumps(told), *lines]) + "\n")
    printed = run_script(SCRIPT, *arguments, "--baseline", "half.jsonl", cwd=tmp_path)
    assert "against half.jsonl in another dtype, bfloat16" in printed
    again = json.loads((tmp_path / "one.json").read_text())["baseline"]
    assert {metric: again[metric] for metric in paired} == paired

    row = json.loads(lines[0])
    (tmp_path / "other.jsonl").write_text(
        "\n".join([header, json.dumps({**row, "question": "f" * 16}), *lines[1:]]) + "\n"
    )
    done = run([sys.executable, str(SCRIPT), *arguments, "--baseline", "other.jsonl"], tmp_path)
    assert done.returncode == 1 and "other questions or answers" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("output", ["scores.jsonl", "."])
def test_an_output_that_would_be_overwritten_or_cannot_be_written_is_refused_at_once(tmp_path, output):
    done = run([sys.executable, str(SCRIPT), "--model", "none", "--output", output], tmp_path)
    assert done.returncode == 2 and "name a .json; the scores go beside it in a .jsonl" in done.stderr
