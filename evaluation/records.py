"""HellaSwag scores on disk: a JSON line per question, so that a killed run goes on where it was."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.hellaswag import Question
from evaluation.hellaswag import HellaSwagResult, QuestionScores, score_questions
from evaluation.loading import identify


def default_output(model_name: str) -> Path:
    """A results file of each model's own."""
    return Path("artifacts", "hellaswag", re.sub(r"[^\w.-]+", "--", model_name).strip("-.") + ".json")


def read_scores(path: Path) -> tuple[dict[str, Any], list[QuestionScores]]:
    """What was scored (the file's first line) and the scores so far, in the order in which they came.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: if the file is not one of ours.
    """
    header, *lines = path.read_text(encoding="utf-8").split("\n")
    try:
        scored = json.loads(header)["hellaswag_scores"]
        complete = lines[:-1]  # what follows the last line break is empty or torn
        return scored, [QuestionScores(**json.loads(line)) for line in complete]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold HellaSwag scores ({error}); choose another file") from error


def resume_scores(
    path: Path, scored: Mapping[str, str], questions: Sequence[Question]
) -> list[QuestionScores]:
    """The scores of these questions that `path` already holds, the file being left ready for `append_scores`.

    It may hold more questions, or fewer.

    Raises:
        ValueError: if they are of another model, dtype or tokenizer than `scored` says, or other questions
            have these ones' numbers there.
    """
    if not path.exists() or path.stat().st_size == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")  # renamed when whole: a kill leaves no half first line
        fresh.write_text(json.dumps({"hellaswag_scores": scored}) + "\n", encoding="utf-8")
        fresh.replace(path)
        return []
    before, scores = read_scores(path)
    differences = [
        f"{key} {before.get(key)!r} there, {scored[key]!r} now"
        for key in scored
        if before.get(key) != scored[key]
    ]
    asked = {question.index: question.fingerprint for question in questions}
    scores = [score for score in scores if score.index in asked]
    changed = [score.index for score in scores if score.question != asked[score.index]]
    if changed:
        differences.append(f"{len(changed):,} other questions, the first is number {min(changed)}")
    if differences:
        raise ValueError(
            f"{path} holds scores of something else ({'; '.join(differences)}); "
            "delete it or choose another --output"
        )
    whole = path.read_text(encoding="utf-8")
    if not whole.endswith("\n"):
        with path.open("r+b") as file:
            file.truncate(len(whole[: whole.rindex("\n") + 1].encode()))
    return scores


def append_scores(path: Path, scores: Sequence[QuestionScores]) -> None:
    """Whole lines, handed to the system before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(score)) + "\n" for score in scores)


def score_and_keep(
    path: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    accelerator: Accelerator,
    *,
    batch_tokens: int | None = None,
) -> tuple[dict[str, str], list[QuestionScores]]:
    """What was scored and the scores by question, from `path` as far as it has them; the rest is added there.

    Only the main process reads and writes the file, and only there are the scores complete.
    """
    scored = identify(model, tokenizer)
    scores = resume_scores(path, scored, questions) if accelerator.is_main_process else []
    done = torch.zeros(max(question.index for question in questions) + 1, dtype=torch.int64)
    done[[score.index for score in scores]] = 1
    done = broadcast(done.to(accelerator.device)).cpu()  # all processes must agree on what is left to do
    left = [question for question in questions if not done[question.index]]
    for batch in score_questions(
        model, tokenizer, left, accelerator, batch_tokens=batch_tokens, progress=True
    ):
        scores += batch
        if accelerator.is_main_process:
            append_scores(path, batch)
    asked = "".join(question.fingerprint for question in questions)
    scored["questions_sha256"] = hashlib.sha256(asked.encode()).hexdigest()
    return scored, sorted(scores, key=lambda score: score.index)


def model_index(
    model_name: str, result: HellaSwagResult, dataset: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """The result as the `model-index` of a model card's metadata, as `ModelCardData` writes it.

    `dataset` is what `data.hellaswag.origin` says of the questions.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(dataset["type"]),
            dataset_name=str(dataset["name"]),
            dataset_split=dataset["split"],
            metric_type=metric,
            metric_name=f"HellaSwag {metric}",
            metric_value=round(share.value, 4),
            metric_args={
                "interval_95": [round(share.low, 4), round(share.high, 4)],
                "questions": share.total,
            },
        )
        for metric, share in result.accuracy.items()
    ]
    return eval_results_to_model_index(model_name, results)


def summary(name: str, dtype: str, result: HellaSwagResult) -> str:
    """Accuracies with their intervals, in all and by source, as lines for a person."""
    lines = [f"{name}: {result.questions:,} questions, {dtype}"]
    for metric, share in result.accuracy.items():
        parts = "  ".join(f"{source} {rows[metric].value:.2%}" for source, rows in result.by_source.items())
        interval = f"95% [{share.low:.2%}, {share.high:.2%}]"
        lines.append(f"  {metric:<20}{share.value:7.2%}  {interval}  {parts}")
    if result.truncated:
        lines.append(
            f"  {result.truncated:,} questions are longer than the model's context and lost their beginning"
        )
    return "\n".join(lines)
