"""The corpus that is already on every machine: the documentation inside the user's own Python environment.

Docstrings of the standard library and of the installed packages, the language's help topics, and the
packages' READMEs. Sources are parsed, never imported. The order is that of sorted names, and a paragraph that
occurs twice (classes inherit and copy their docstrings) is kept once, so the same environment gives the same
documents.

Standard library only: the processes that parse start in milliseconds.
"""

from __future__ import annotations

import ast
import email
import hashlib
import inspect
import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_DOCSTRING_WORDS = 12
MIN_LETTERS = 0.62  # of a text's characters; tables, code dumps and ASCII art have fewer
MIN_DOCUMENT_CHARACTERS = 200
MAX_SOURCE_BYTES = 2_000_000  # larger files are generated
SKIPPED_FOLDERS = {
    "__pycache__",
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "site-packages",
    "dist-packages",
}
SKIPPED_FOLDERS |= {"node_modules", "lib2to3", "idlelib", "encodings", "licenses"}
# This project's own: a changed line of its README would be another corpus, and move the demo's figures.
OWN_FOLDERS = re.compile(r"gpt_scratch-.*\.dist-info|modeling_gpt_scratch")
PROSE_FILES = {".md", ".rst"}
NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|change|history|news|authors|contributors|release|third.?party", re.I
)
LEGAL = re.compile(
    r"licensed under|permission is hereby granted|all rights reserved|redistribution and use", re.I
)
MARKUP_LINE = re.compile(
    r"^\s*(\[?!\[|<|\.\. (image|_|\||figure|raw|toctree|include)|:target:|:alt:|\[[^]]+\]: )"
    r"|badge|shields\.io"
)


def python_documents(processes: int | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of every document: help topics, then the standard library's modules, then each package's."""
    stdlib = library_folder()
    # Paths with their ids; ids are relative, so that another installation folder changes nothing.
    files = [(f"stdlib/{name}", stdlib / name) for name in _files_below(stdlib)]
    for root in package_folders():
        files += [(name, root / name) for name in _files_below(root)]
    seen: set[bytes] = set()
    for topic, text in _help_topics(stdlib / "pydoc_data" / "topics.py"):
        yield from _document(f"help/{topic}", [text], seen)
    for (name, _), paragraphs in zip(
        files, _extract_all([path for _, path in files], processes), strict=True
    ):
        yield from _document(name, paragraphs, seen)


def library_folder() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_folders() -> list[Path]:
    """Where installed packages lie, in the order of the import path, each folder once."""
    paths = sysconfig.get_paths()
    candidates = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    folders = dict.fromkeys(Path(candidate).resolve() for candidate in candidates)
    return [folder for folder in folders if folder.is_dir()]


def _files_below(root: Path) -> list[str]:
    """Files worth parsing, as sorted relative names with forward slashes."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in SKIPPED_FOLDERS and not OWN_FOLDERS.fullmatch(name)
        ]
        inside = Path(folder)
        for name in files:
            suffix = os.path.splitext(name)[1]
            prose = suffix in PROSE_FILES and not NOT_PROSE.search(name)
            if suffix == ".py" or prose or (name == "METADATA" and inside.name.endswith(".dist-info")):
                names.append((inside / name).relative_to(root).as_posix())
    return sorted(names)


def _document(name: str, paragraphs: list[str], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    kept = []
    for paragraph in paragraphs:
        # Compared without the heading line, which differs between copies of one docstring.
        body = paragraph.partition("\n")[2] if "\n" in paragraph else paragraph
        key = hashlib.blake2b("".join(body.split()).encode("utf-8", "replace"), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    text = "\n\n".join(kept)
    if len(text) >= MIN_DOCUMENT_CHARACTERS:
        yield name, text.strip() + "\n"


def _extract_all(paths: list[Path], processes: int | None) -> Iterator[list[str]]:
    """What `extract` gives for each path, in order, computed in several processes of this very file."""
    count = processes or min(os.cpu_count() or 1, 8)
    workers = []
    for first in range(count):
        # A fresh interpreter on this file alone: multiprocessing would import the user's main script again,
        # torch and all.
        worker = subprocess.Popen(
            [sys.executable, "-I", os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([os.fspath(path) for path in paths[first::count]]).encode() + b"\n")
        worker.stdin.close()
        workers.append(worker)
    try:
        for index, path in enumerate(paths):
            output = workers[index % count].stdout
            assert output is not None
            line = output.readline()
            if not line:
                raise RuntimeError(f"A process that reads docstrings ended early, at {path}.")
            yield json.loads(line)
    finally:
        for worker in workers:
            worker.kill()
            assert worker.stdout is not None
            worker.stdout.close()
            worker.wait()


def extract(path: Path) -> list[str]:
    """The paragraphs of prose in one file; none if it cannot be read or parsed."""
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            return []
        content = path.read_bytes()
        if path.suffix == ".py":
            return _docstrings(content) if b'"""' in content or b"'''" in content else []
        text = content.decode("utf-8")
        if path.name == "METADATA":
            message = email.message_from_string(text)
            text = str(message.get_payload() or message.get("Description") or "")
    except (OSError, UnicodeDecodeError):
        return []
    return _clean_prose(text)


def _docstrings(source: bytes) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    paragraphs: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                full_name = f"{name}.{child.name}" if name else child.name
                text = _docstring(child)
                if text:
                    if isinstance(child, ast.ClassDef):
                        paragraphs.append(f"class {full_name}\n{text}")
                    else:
                        paragraphs.append(f"{full_name}({_argument_names(child)})\n{text}")
                if isinstance(child, ast.ClassDef):
                    visit(child, full_name)
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                visit(child, name)

    text = _docstring(tree)
    if text:
        paragraphs.append(text)
    try:
        visit(tree, "")
    except RecursionError:  # since Python 3.12 the parser takes deeper nesting than Python code can follow
        return []
    return paragraphs


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    raw = ast.get_docstring(node, clean=False)
    if not raw or len(raw) < 4 * MIN_DOCSTRING_WORDS:
        return ""
    text = inspect.cleandoc(raw)
    # A docstring may hold what was never text, such as escaped lone surrogates.
    text = text.encode("utf-8", "ignore").decode("utf-8").strip()
    return text if len(text.split()) >= MIN_DOCSTRING_WORDS and _is_prose(text) else ""


def _argument_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = function.args
    names = [
        argument.arg
        for argument in arguments.posonlyargs + arguments.args
        if argument.arg not in ("self", "cls")
    ]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(names)


def _is_prose(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    ascii_only = len(text.encode("utf-8")) < 1.1 * len(text)
    visible = len(text) - text.count(" ") - text.count("\n")
    return ascii_only and letters >= MIN_LETTERS * visible and not LEGAL.search(text[:600])


def _clean_prose(text: str) -> list[str]:
    """A README without badges, images and raw HTML, in paragraphs."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n") if not MARKUP_LINE.search(line)]
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).strip())
    if not _is_prose(" ".join(paragraphs)):
        return []
    return [paragraph for paragraph in paragraphs if paragraph.strip()]


def _help_topics(path: Path) -> list[tuple[str, str]]:
    """The language's own help (`help("with")`): a dictionary in a file of the standard library."""
    try:
        tree = ast.parse(path.read_bytes())
    except OSError:  # some distributions leave it out
        return []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []


def _serve() -> None:
    """Worker: a JSON list of paths on standard input; one JSON list of paragraphs per line on standard
    output.
    """
    warnings.simplefilter("ignore")  # other people's invalid escapes
    for path in json.loads(sys.stdin.buffer.readline()):
        print(json.dumps(extract(Path(path))), flush=False)


if __name__ == "__main__":
    _serve()
