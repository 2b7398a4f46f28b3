"""docs/reliability.md promises what is tried, no more and no less."""

import test_launcher_torture
import test_training_torture
from reliability_table import promised_rows, written_rows


def test_the_table_has_a_row_for_each_fault_and_the_number_of_its_cases():
    promised = promised_rows(test_launcher_torture, test_training_torture)  # in pytest's order
    assert list(written_rows().items()) == list(promised.items())
