"""HellaSwag scores on disk: a JSON line per question, so that a killed run goes on where it was."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
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


def resume_scores(path: Path, scored: dict[str, Any]) -> list[QuestionScores]:
    """The scores that `path` already holds, the file being left ready for `append_scores`.

    Raises:
        ValueError: if they are of another model, dtype, tokenizer or set of questions than `scored` says.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"hellaswag_scores": scored}) + "\n", encoding="utf-8")
        return []
    before, scores = read_scores(path)
    differences = [
        f"{key} {before.get(key)!r} there, {scored[key]!r} now"
        for key in scored
        if before.get(key) != scored[key]
    ]
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
) -> tuple[dict[str, Any], list[QuestionScores]]:
    """What was scored and the scores by question, from `path` as far as it has them; the rest is added there.

    Only the main process reads and writes the file, and only there are the scores complete.
    """
    described = describe(model, tokenizer, questions)
    scores = resume_scores(path, described) if accelerator.is_main_process else []
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
    return described, sorted(scores, key=lambda score: score.index)


def describe(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> dict[str, Any]:
    """What decides the scores, as hashes: weights, vocabulary, questions; and the dtype."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    asked = json.dumps([dataclasses.astuple(question) for question in questions]).encode()
    return {
        "weights_sha256": weights.hexdigest(),
        "vocabulary_sha256": hashlib.sha256(vocabulary).hexdigest(),
        "questions_sha256": hashlib.sha256(asked).hexdigest(),
        "questions": len(questions),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def model_index(model_name: str, result: HellaSwagResult, *, dataset: str) -> list[dict[str, Any]]:
    """The result as the `model-index` of a model card's metadata, as `ModelCardData` writes it."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name="HellaSwag",
            dataset_split="validation",
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
