"""What an export is: which files make it whole, which of them go out, and the run that it came from."""

import json
import re
import struct
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD_FILE = "README.md"
PICTURE_FILE = "loss.png"
AVERAGED_FOLDER = "export-ema"  # of a run, for the moving average of its weights
RUN_FOLDER = "training"  # of a repository on the Hub, for the files of the run

# By their names: a checkpoint's optimizer and random states are for resuming, and stay home; so does whatever
# a person may have put beside them.
OUTGOING = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.jinja"
    r"|[A-Za-z_]\w*\.py|README\.md|LICENSE|loss\.png"
)
FOR_RESUMING = (
    "optimizer.safetensors",
    "random_states.safetensors",
    "training_state.json",
    "settings.yaml",
    "COMPLETE",
)
# Weights under any name of the same scheme: what an older export left on the Hub must not be loaded in place
# of the new one.
ANY_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)

# Files of a run that go along, from its directory.
SETTINGS_FILE = "settings.yaml"
RUN_FILES = (SETTINGS_FILE, "metrics.jsonl", "report.html", PICTURE_FILE)


class ReleaseError(ValueError):
    """Something that the model's owner has to do something about; the message says what."""


def check_export(folder: Path) -> None:
    """Every file that `from_pretrained` and `pipeline` will ask for is there and is what it says.

    Raises:
        ReleaseError: naming everything that is missing or damaged.
    """
    if not folder.is_dir():
        raise ReleaseError(
            f"{folder} is not a folder; give a run's export, such as artifacts/runs/demo/export"
        )
    problems: list[str] = []
    is_adapter = (folder / ADAPTER_FILES[0]).exists()
    if is_adapter:
        parts = [ADAPTER_FILES[1]]
    else:
        config = _read_json(folder / "config.json", problems)
        problems += [f"{name} is missing, which config.json names" for name in _missing_code(folder, config)]
        _read_json(folder / "generation_config.json", problems)
        parts = [WEIGHTS_FILE]
        if (folder / WEIGHTS_INDEX_FILE).exists():
            index = _read_json(folder / WEIGHTS_INDEX_FILE, problems)
            parts = sorted(set(index.get("weight_map", {}).values())) or parts
    problems += [problem for name in parts if (problem := _damage(folder / name))]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _read_json(folder / name, problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ReleaseError(f"{folder} is not a whole export:\n{listed}\nExport the model again.")


def outgoing_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that go out, and the names of those that stay, in the order of their names.

    What only serves to go on from a checkpoint is neither.
    """
    entries = sorted(folder.iterdir())
    going = [path for path in entries if path.is_file() and OUTGOING.fullmatch(path.name)]
    return going, [path.name for path in entries if path not in going and path.name not in FOR_RESUMING]


def local_base(folder: Path) -> str | None:
    """Of an adapter whose base is a folder of this machine, that folder: others will not find it."""
    base = _read_json(folder / ADAPTER_FILES[0], []).get("base_model_name_or_path")
    is_hub_id = isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return None if base is None or is_hub_id else str(base)


def find_run(folder: Path) -> Path | None:
    """The run directory that `folder` lies in: an export in it, or one of its checkpoints."""
    absolute = folder.resolve()
    for candidate in (absolute.parent, absolute.parent.parent):
        if (candidate / "settings.yaml").is_file() and (candidate / "metrics.jsonl").is_file():
            return candidate
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The export's config.json.

    Raises:
        ReleaseError: if there is none.
    """
    problems: list[str] = []
    config = _read_json(folder / "config.json", problems)
    if problems:
        raise ReleaseError(f"{folder} is not an export: {'; '.join(problems)}")
    return config


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problems.append(f"{path.name} does not hold a JSON object")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return {}


def _missing_code(folder: Path, config: dict[str, Any]) -> list[str]:
    """Code files that `auto_map` names ("modeling_x.Class") or one of those imports, and that are missing."""
    named: set[str] = set()
    for value in (config.get("auto_map") or {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if reference and "--" not in reference:  # those are of another repository
                named.add(reference.split(".")[0] + ".py")
    for name in [name for name in named if (folder / name).is_file()]:
        code = (folder / name).read_text(encoding="utf-8", errors="replace")
        named |= {f"{module}.py" for module in RELATIVE_IMPORT.findall(code)}
    return sorted(name for name in named if not (folder / name).is_file())


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its length; its numbers are not read."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return f"{path.name} is cut short"
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        return f"{path.name} is no safetensors file ({type(error).__name__}: {error})"
    if not tensors:
        return f"{path.name} holds no weights"
    if expected != path.stat().st_size:
        return f"{path.name} has {path.stat().st_size:,} bytes, its header says {expected:,}"
    return None
