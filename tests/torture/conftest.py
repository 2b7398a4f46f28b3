"""The table in docs/reliability.md is what the tests here say of themselves when all of them pass.

`WRITE_RELIABILITY=1 pytest -m slow tests/torture` writes it.
"""

import os
from pathlib import Path

import faults
import pytest
from promises import STEPS
from reliability_table import BEGIN, END, TABLE
from training_toys import write_toy_shards

ROWS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, promise): a row of docs/reliability.md")
    config.stash[ROWS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("fault")
    if marker is not None and call.when == "call":
        passed, total = item.config.stash[ROWS].get(marker.args, (0, 0))
        item.config.stash[ROWS][marker.args] = (passed + report.passed, total + 1)
    return report


def pytest_sessionfinish(session, exitstatus):
    rows = session.config.stash[ROWS]
    if (
        os.environ.get("WRITE_RELIABILITY")
        and rows
        and all(passed == total for passed, total in rows.values())
    ):
        lines = ["| what happens | what the run promises | tried |\n", "|---|---|---|\n"]
        lines += [f"| {what} | {promise} | {total} × |\n" for (what, promise), (_, total) in rows.items()]
        before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
        TABLE.write_text(before + BEGIN + "".join(lines) + END + rest.partition(END)[2], encoding="utf-8")


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
