"""All that a Space of the Hub needs, in one folder: the page, the prompt, the model's code and the model.

python -m space.assemble map-key --model artifacts/runs/dungeons/export
python -m space.assemble map-key --model user/name
hf upload user/map-key map-key . --repo-type space
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from release.folder import ReleaseError, check_export, outgoing_files

ROOT = Path(__file__).resolve().parent.parent
CARRIED = (
    "app.py",
    "LICENSE",
    "data/__init__.py",
    "data/dungeons.py",
    "data/corpora/dungeons",
    "evaluation/__init__.py",
    "evaluation/loading.py",
    "modeling_gpt_scratch",
    "release/__init__.py",
    "release/folder.py",
    "space",
)
MODEL_FOLDER = "export"
START = '''"""What this Space runs; space/assemble.py wrote it."""

import app

app.main({arguments!r})
'''


def assemble(output: Path, model: str, trust_remote_code: bool = False) -> None:
    """Fill `output`, a new or empty folder. A model in a folder goes along; one of the Hub is named.

    Raises:
        ReleaseError: if `output` holds something, or the model's folder is not a whole export.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ReleaseError(f"{output} is not an empty folder, and nothing is overwritten. Name another one.")
    source = Path(model)
    is_folder = source.is_dir() or model.count("/") > 1 or model.startswith((".", "/"))
    if is_folder:
        check_export(source)
    for name in CARRIED:
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    shutil.move(output / "space" / "requirements.txt", output)
    card = (output / "space" / "README.md").rename(output / "README.md")
    if is_folder:
        (output / MODEL_FOLDER).mkdir()
        for path in outgoing_files(source)[0]:
            shutil.copy(path, output / MODEL_FOLDER)
    else:
        _, front_matter, text = card.read_text(encoding="utf-8").split("---\n", 2)
        card.write_text(f"---\n{front_matter}models:\n- {model}\n---\n{text}", encoding="utf-8")
    arguments = ["--model", MODEL_FOLDER if is_folder else model]
    arguments += ["--trust_remote_code"] * trust_remote_code
    (output / "start.py").write_text(START.format(arguments=arguments), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m space.assemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="a folder that is new or empty")
    parser.add_argument(
        "--model", required=True, help="an export's folder, which goes along, or user/name on the Hub"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    arguments = parser.parse_args(argv)
    try:
        assemble(arguments.output, arguments.model, arguments.trust_remote_code)
    except ReleaseError as error:
        raise SystemExit(str(error)) from error
    print(f"{arguments.output} is ready: hf upload user/name {arguments.output} . --repo-type space")


if __name__ == "__main__":
    main()
