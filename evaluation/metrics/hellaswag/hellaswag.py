"""HellaSwag accuracy as a metric of the `evaluate` library, which copies this file: it stands alone."""

import math

import datasets
import evaluate

DESCRIPTION = """
Accuracy of a language model that chooses among the endings of a HellaSwag question by their
log-probabilities: the likeliest ending (`acc`) and the likeliest by unit of length (`acc_norm`), with
standard errors.
"""

INPUTS = """
predictions: for each question, the summed log-probability of each ending, in nats.
references: for each question, the index of the right ending.
lengths: for each question, what to divide each ending by: its characters (the way of lm-evaluation-harness)
or
    its tokens (the way of build-nanogpt).
"""

CITATION = """
@inproceedings{zellers2019hellaswag,
  title = {HellaSwag: Can a Machine Really Finish Your Sentence?},
  author = {Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
  booktitle = {Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
  year = {2019}
}
"""


class HellaSwag(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.Value("int32"),
                    "lengths": datasets.List(datasets.Value("int32")),
                }
            ),
            homepage="https://rowanzellers.com/hellaswag",
        )

    def _compute(self, predictions, references, lengths):
        right = {"acc": 0, "acc_norm": 0}
        for question, (sums, label, units) in enumerate(zip(predictions, references, lengths, strict=True)):
            if len(sums) != len(units) or not 0 <= label < len(sums):
                raise ValueError(
                    f"question {question}: {len(sums)} log-probabilities, {len(units)} lengths and "
                    f"label {label} do not fit together"
                )
            if any(math.isnan(total) for total in sums):
                raise ValueError(f"question {question}: a log-probability is NaN")
            normed = [total / n if n else -math.inf for total, n in zip(sums, units, strict=True)]
            right["acc"] += max(range(len(sums)), key=sums.__getitem__) == label
            right["acc_norm"] += max(range(len(sums)), key=normed.__getitem__) == label
        results = {}
        for name, count in right.items():
            share = count / len(references)
            results[name] = share
            results[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(1, len(references) - 1))
        return results
