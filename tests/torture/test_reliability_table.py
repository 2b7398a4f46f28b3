"""docs/reliability.md promises what is tried, no more and no less."""

import test_launcher_torture
import test_training_torture
from reliability_table import BEGIN, END, TABLE


def test_the_table_has_a_row_for_each_fault_that_is_tried():
    markers = [
        mark.args
        for torture in (test_launcher_torture, test_training_torture)  # in pytest's order
        for test in vars(torture).values()
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "fault"
    ]
    table = TABLE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[2:]]
    assert rows == markers
