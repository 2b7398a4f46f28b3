"""The benchmarks' one command: it lists them, runs each without peers; its page is what their JSON says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_toys import ROOT, environment, write_toy_shards

from benchmarks.__main__ import BENCHMARKS, PAGE, RESULTS, has_file, listing, report_of
from benchmarks.contenders import Shape, our_model, shape_from_words, stock_model
from benchmarks.harness import Result, Table, read_result, table_from_markdown, with_spread

NAMES = [benchmark.name for benchmark in BENCHMARKS if has_file(benchmark)]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_of_results_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == report_of(RESULTS), "python -m benchmarks --report writes it"


def test_every_result_names_its_command_date_commit_and_machine():
    for file in RESULTS.glob("*.json"):
        result = read_result(file)
        assert file.stem == result.name or file.stem.startswith(f"{result.name}_")  # of another machine
        assert all((result.command, result.date, result.commit, result.hardware, result.title)), file.name


def test_the_list_has_every_benchmark_with_its_aim():
    listed = listing()
    for benchmark in BENCHMARKS:
        if has_file(benchmark):
            assert benchmark.name in listed and benchmark.aim in listed


def test_every_benchmark_stands_in_the_list():
    others = {"__init__", "__main__", "harness", "contenders", "bakeoff"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - others
    assert files == set(NAMES)


def test_a_result_reads_back_as_it_was_written(tmp_path):
    table = Table("some title", ["a", "b"], [["1", "x (1–2)"], ["2", ""]])
    assert table_from_markdown(table.as_markdown()) == table
    result = Result(
        "toy", "Toy", "About.", [table], [{"a": 1}], [["peer", "not here"]], "command", "today", "abc"
    )
    file = tmp_path / "toy.json"
    file.write_text(json.dumps(result, default=vars))
    assert read_result(file) == result
    assert "Not run: peer (not here)." in result.as_markdown()


def test_shapes_count_the_parameters_of_the_models_that_they_describe():
    shape = Shape(2, 2, 32, 512, 64, 3)
    assert shape_from_words(shape.words()) == shape
    for model in (our_model(shape), stock_model(shape)):
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


def test_spread_is_the_median_and_the_extremes():
    assert with_spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0–3.0)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["training_step", "generation", "loss", "loop_overhead", "startup", "plan", "scaling"]
)
def test_a_benchmark_runs_at_toy_size_and_says_which_peers_are_missing(name, tmp_path):
    run(name, "--quick", "--threads", "1", "--json", str(tmp_path))
    result = read_result(tmp_path / f"{name}.json")
    assert result.tables and all(table.rows for table in result.tables)
    if name in ("training_step", "generation"):
        assert any("nanoGPT" in who and "--peers" in why for who, why in result.not_run)


@pytest.mark.slow
def test_quality_for_time_runs_at_toy_size(tmp_path):
    shards = write_toy_shards(tmp_path / "toy")
    command = [sys.executable, "-m", "benchmarks.quality_for_time", "--quick", "--threads", "1"]
    command += ["--data", str(shards), "--json", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "quality_for_time.json")
    for contender in ("ours", "ours, AdamW", "HF Trainer"):
        losses = [row["loss"] for row in result.figures if row["contender"] == contender]
        assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.slow
def test_preparation_and_hellaswag_run_at_toy_size(tmp_path):
    text = {"text": "The model reads a token and learns of dungeons. " * 200}
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} {text['text']}"}) + "\n" for n in range(60)))
    run("preparation", "--quick", "--texts", str(texts), "--json", str(tmp_path))
    assert read_result(tmp_path / "preparation.json").tables[0].rows
    pytest.importorskip("lm_eval", reason="the reference is not installed")
    questions = ROOT / "tests" / "fixtures" / "hellaswag.jsonl"
    run("hellaswag", "--quick", "--questions", str(questions), "--json", str(tmp_path))
    assert read_result(tmp_path / "hellaswag.json").tables[0].rows


def test_data_that_was_not_given_is_asked_for(tmp_path):
    assert "--texts" in run("preparation", "--quick") and not list(Path(tmp_path).iterdir())
