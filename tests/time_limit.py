"""A test that takes too long fails the run by its name."""

import collections

import pytest


class TimeLimit:
    """Adds up setup, call and teardown of each test, and fails the run by the names of those over
    the limit."""

    def __init__(self, limit: float):
        self.limit, self.seconds = limit, collections.Counter()

    def over(self) -> dict[str, float]:
        return {name: s for name, s in self.seconds.items() if s > self.limit}

    def pytest_runtest_logreport(self, report):
        if "slow" not in report.keywords:
            self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, session, exitstatus):
        if self.over() and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for name, seconds in self.over().items():
            terminalreporter.write_line(
                f"FAILED {name}: took {seconds:.1f} s, a test may take {self.limit:g}; make it "
                "smaller, share what it makes, or mark it slow",
                red=True,
            )
