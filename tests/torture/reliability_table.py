"""The table of docs/reliability.md: where it stands, and what it must say by the tests' own marks."""

from math import prod
from pathlib import Path
from types import ModuleType

TABLE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: written by tests/torture -->\n", "<!-- end of table -->\n"


def promised_rows(*modules: ModuleType) -> dict[tuple[str, str], int]:
    """By what happens and what is promised then: in how many cases the tests of `modules` try it."""
    rows: dict[tuple[str, str], int] = {}
    for module in modules:
        for test in vars(module).values():
            marks = getattr(test, "pytestmark", [])
            cases = prod(len(mark.args[1]) for mark in marks if mark.name == "parametrize")
            for mark in marks:
                if mark.name == "fault":
                    rows[mark.args] = rows.get(mark.args, 0) + cases
    return rows


def written_rows() -> dict[tuple[str, str], int]:
    """The same as the document has it."""
    table = TABLE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cells = ([cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:])
    return {(what, promise): int(tried.removesuffix(" ×")) for what, promise, tried in cells}


def write_rows(rows: dict[tuple[str, str], int]) -> None:
    lines = ["| what happens | what the run promises | tried |\n", "|---|---|---|\n"]
    lines += [f"| {what} | {promise} | {cases} × |\n" for (what, promise), cases in rows.items()]
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    TABLE.write_text(before + BEGIN + "".join(lines) + END + rest.partition(END)[2], encoding="utf-8")
