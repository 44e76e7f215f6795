"""A test that takes too long fails the run by its name.

What XLA compiled in a test does not count: it is kept for the next run, and a first one on a new
machine is no fault of the test.
"""

import collections

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax


class Compiled:
    """Writes into each report how long XLA compiled: `compiled`, in seconds."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_) -> None:
        if event == COMPILED:
            self.seconds += seconds

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        report.compiled, self.seconds = self.seconds, 0.0


class TimeLimit:
    """Adds up setup, call and teardown of each test, and fails the run by the names of those over
    the limit."""

    def __init__(self, limit: float):
        self.limit, self.seconds = limit, collections.Counter()

    def over(self) -> dict[str, float]:
        return {name: s for name, s in self.seconds.items() if s > self.limit}

    def pytest_runtest_logreport(self, report):
        if "slow" not in report.keywords:
            self.seconds[report.nodeid] += report.duration - getattr(report, "compiled", 0.0)

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
