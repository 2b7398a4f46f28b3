"""The table in docs/reliability.md is what the tests here say of themselves when all of them pass.

`WRITE_RELIABILITY=1 pytest -m slow tests/torture` writes it.
"""

import os
from pathlib import Path

import faults
import pytest
from promises import STEPS
from reliability_table import promised_rows, write_rows
from training_toys import write_toy_shards

PASSED = pytest.StashKey[dict]()


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, promise): a row of docs/reliability.md")
    config.stash[PASSED] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("fault")
    if marker is not None and call.when == "call" and report.passed:
        rows = item.config.stash[PASSED]
        rows[marker.args] = rows.get(marker.args, 0) + 1
    return report


def pytest_sessionfinish(session, exitstatus):
    """A case that failed, was skipped or was not chosen leaves the document as it is."""
    if not os.environ.get("WRITE_RELIABILITY"):
        return
    # Not above: pytest imports tests itself, to rewrite their assertions.
    import test_launcher_torture
    import test_training_torture

    promised = promised_rows(test_launcher_torture, test_training_torture)
    passed = session.config.stash[PASSED]
    missing = [
        f"{what}: {passed.get((what, p), 0)} of {n}"
        for (what, p), n in promised.items()
        if passed.get((what, p), 0) != n
    ]
    if missing:
        print("\ndocs/reliability.md was not written. Passed were, of", "; of ".join(missing))
    else:
        write_rows(promised)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    faults.start_fork_server()
    return write_toy_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def settings(shards, tmp_path) -> dict:
    return {**STEPS, "shards": shards, "run_dir": tmp_path / "run"}


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert faults.run({**STEPS, "shards": shards, "run_dir": folder}).code == 0
    return folder
