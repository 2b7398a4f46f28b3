"""HellaSwag as a metric of the `evaluate` library: from the local folder, without network, over processes."""

from pathlib import Path

import pytest

from evaluation.hellaswag import QuestionScores, summarize
from tests.processes import run_workers

FOLDER = Path(__file__).parent.parent / "evaluation" / "metrics" / "hellaswag"
QUESTIONS = [
    ([-31.5, -40.2, -29.9, -55.0], [28, 41, 30, 44], 2),
    ([-10.0, -9.0, -12.0, -11.0], [10, 4, 13, 12], 2),
    ([-5.0, -5.0, -6.0, -7.0], [5, 5, 3, 0], 0),  # a tie goes to the first; an empty ending never wins
]


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    import evaluate

    return lambda **options: evaluate.load(str(FOLDER), cache_dir=str(tmp_path), **options)


def test_the_metric_loads_from_the_folder_and_agrees_with_our_evaluation(load):
    metric = load()
    for sums, lengths, label in QUESTIONS:
        metric.add_batch(predictions=[sums], references=[label], lengths=[lengths])
    computed = metric.compute()
    scores = [
        QuestionScores(number, "", label, "x", {"harness": sums}, {"harness": lengths})
        for number, (sums, lengths, label) in enumerate(QUESTIONS)
    ]
    ours = summarize(scores).accuracy
    assert computed["acc"] == ours["harness_acc"].value == pytest.approx(2 / 3)
    assert computed["acc_norm"] == ours["harness_acc_norm"].value == pytest.approx(1 / 3)
    assert computed["acc_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)


@pytest.mark.parametrize(
    ("sums", "lengths", "label", "message"),
    [
        ([-1.0, -2.0], [1, 1], 2, "label 2"),
        ([-1.0, -2.0], [1], 0, "1 lengths"),
        ([-1.0, float("nan")], [1, 1], 0, "NaN"),
    ],
)
def test_inputs_that_do_not_fit_together_are_errors(load, sums, lengths, label, message):
    metric = load()
    metric.add_batch(predictions=[sums], references=[label], lengths=[lengths])
    with pytest.raises(ValueError, match=message):
        metric.compute()


WORKER = """
import os, sys, evaluate
from tests.processes import report
from tests.test_evaluation_metric import FOLDER, QUESTIONS
rank = int(os.environ["RANK"])
names = {"num_process": 2, "process_id": rank, "experiment_id": "two"}
metric = evaluate.load(str(FOLDER), cache_dir=sys.argv[1], **names)
for sums, lengths, label in QUESTIONS[rank::2]:
    metric.add_batch(predictions=[sums], references=[label], lengths=[lengths])
report(metric.compute())
"""


@pytest.mark.slow
def test_two_processes_give_the_result_of_all_questions_to_the_first(tmp_path):
    first, second = run_workers(2, WORKER, tmp_path)
    assert first["acc"] == pytest.approx(2 / 3) and second is None
