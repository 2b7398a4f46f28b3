"""Where the table of docs/reliability.md stands."""

from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: written by tests/torture -->\n", "<!-- end of table -->\n"
