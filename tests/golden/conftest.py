"""A golden test that always skips is worse than none: here a skip is a failure."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and "golden" in item.path.parts:
        report.outcome, report.longrepr = (
            "failed",
            f"a golden must run, and this was skipped: {report.longrepr}",
        )
    return report
