"""What is known of a model from the files beside it: its own, and those of the run that it came from.

Whatever is missing or damaged is None or empty: a card says less then, never something made up.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from release.folder import ADAPTER_FILES, AVERAGED_FOLDER, WEIGHTS_FILE, WEIGHTS_INDEX_FILE

Z_95 = 1.959964  # standard deviations to either side of the mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Record:
    """An export and its run, read. `receipt` is of the training data.

    `is_averaged` says that the weights are the run's moving average, of which less was measured.
    """

    config: dict[str, Any]
    parameters: int | None
    settings: dict[str, Any]
    receipt: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    finetuning: dict[str, Any]
    hellaswag: dict[str, Any]
    is_averaged: bool = False

    @property
    def is_dungeons(self) -> bool:
        """Whether it was fine-tuned into a writer of dungeon rooms."""
        return "field_dropout" in self.settings

    @property
    def validation(self) -> dict[str, Any]:
        """The line of metrics that belongs to the exported weights: the best one if those were exported."""
        lines = [line for line in self.metrics if is_number(line.get("validation_loss"))]
        if not lines:
            return {}
        line = lines[-1]
        if self.settings.get("export_best"):
            line = min(lines, key=lambda line: line["validation_loss"])
        if not self.is_averaged:
            return line
        averaged = line.get("averaged_validation_loss")
        return {"validation_loss": averaged} if is_number(averaged) else {}

    @property
    def quantisation(self) -> str:
        """By what the weights were quantised, as a sentence; empty for weights that were not."""
        settings = self.config.get("quantization_config")
        if not isinstance(settings, dict):
            return ""
        text = json.dumps(settings)
        bits = "four-bit " if '"int4"' in text else "eight-bit " if "Int8WeightOnly" in text else ""
        return f"Its projections have {bits}weights, rounded by {settings.get('quant_method')}."

    @property
    def started(self) -> dict[str, Any]:
        """The newest event that says what the run computes on."""
        starts = [event for event in self.events if event.get("event") in ("started", "resumed")]
        return starts[-1] if starts else {}

    def last(self, name: str) -> Any:
        """The newest number of that name in the metrics, or None."""
        return next((line[name] for line in reversed(self.metrics) if is_number(line.get(name))), None)


def read_record(
    folder: Path, run: Path | None, hellaswag: Path | None = None, *, weights: Path | None = None
) -> Record:
    """All of it. `hellaswag` is a results file of eval_hellaswag.py; else `hellaswag.json` of the run.

    `weights` is the export whose parameters are counted, where `folder` is another form of it.
    """
    if run is None:
        beside: dict[str, Any] = {
            "settings": {},
            "receipt": {},
            "metrics": [],
            "events": [],
            "samples": [],
            "finetuning": {},
        }
    else:
        settings = _mapping(run / "settings.yaml")
        beside = {
            "settings": settings,
            "receipt": _receipt(_mapping(run / "data.json"), settings),
            "metrics": _lines(run / "metrics.jsonl"),
            "events": _lines(run / "events.jsonl"),
            "samples": _lines(run / "samples.jsonl"),
            "finetuning": _mapping(run / "finetuning.json"),
        }
        hellaswag = hellaswag or run / "hellaswag.json"
    scores = _mapping(hellaswag) if hellaswag else {}
    is_averaged = (weights or folder).name == AVERAGED_FOLDER
    if is_averaged:  # only its loss was measured; the rest is of the last weights
        metrics = [line for line in beside["metrics"] if "hellaswag_acc_norm" not in line]
        beside |= {"metrics": metrics, "samples": [], "finetuning": {}}
        scores = {}
    config = _mapping(folder / "config.json")
    # What quantised weights are stored as has more numbers than the model has parameters.
    counted = weights or (None if "quantization_config" in config else folder)
    return Record(
        config=config,
        parameters=_parameters(counted) if counted is not None else None,
        hellaswag=scores,
        is_averaged=is_averaged,
        **beside,
    )


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `total` independent answers (Wilson 1927)."""
    centre = (share + Z_95**2 / (2 * total)) / (1 + Z_95**2 / total)
    half = Z_95 / (1 + Z_95**2 / total) * math.sqrt(share * (1 - share) / total + (Z_95 / (2 * total)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _receipt(data: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What the run noted of its data; of runs that noted only a fingerprint, their shards' manifest if it is
    still the same.
    """
    if "training_tokens" in data or not isinstance(settings.get("shards"), str):
        return data
    manifest = _mapping(Path(settings["shards"], "manifest.json"))
    try:
        content = [
            manifest["tokenizer_fingerprint"],
            *([shard["split"], shard["sha256"]] for shard in manifest["shards"]),
        ]
        if hashlib.sha256(json.dumps(content).encode()).hexdigest() != data.get("data_fingerprint"):
            return data
        tokens = {"train": 0, "validation": 0}
        for shard in manifest["shards"]:
            tokens[shard["split"]] += shard["tokens"]
        return {
            **data,
            "source": manifest["settings"].get("source"),
            "config": manifest["settings"].get("config"),
            "tokenizer": manifest["tokenizer"],
            "training_tokens": tokens["train"],
            "validation_tokens": tokens["validation"],
            "documents": sum(shard["documents"] for shard in manifest["shards"]),
            "duplicates_dropped": manifest["counts"].get("duplicates"),
            "contamination": manifest.get("contamination"),
        }
    except (KeyError, TypeError, AttributeError):
        return data


def _parameters(folder: Path) -> int | None:
    """Numbers in the weights, counted in the safetensors headers; tied ones are stored, and count, once."""
    index = _mapping(folder / WEIGHTS_INDEX_FILE).get("weight_map")
    names = sorted(set(index.values())) if isinstance(index, dict) else [WEIGHTS_FILE]
    if not (folder / names[0]).exists():
        names = [ADAPTER_FILES[1]]
    total = 0
    try:
        for name in names:
            with (folder / name).open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            total += sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
    except (OSError, struct.error, ValueError, KeyError, TypeError, OverflowError):
        return None
    return total


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the end of a line that a kill cut off
        if isinstance(line, dict):
            lines.append(line)
    return lines
