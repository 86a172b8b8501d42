"""A pytest plugin: a row for each test as soon as it has ended, with its whole traceback.

A test that loses the CUDA context, or ends the process, is named as the one that did, and costs no other its turn: the
suite starts a new process, which goes on behind it.
"""

from __future__ import annotations

import pytest
from attempts import Attempts

from lowvram_grpo.bench.rows import LOST, context_is_lost


class RowsPlugin:
    """Runs every `of`-th test, from number `shard` on, that has not been run before.

    Args:
        until: time.monotonic() after which no test is begun.
    """

    def __init__(self, attempts: Attempts, shard: int, of: int, over):
        self.attempts, self.shard, self.of, self.over = attempts, shard, of, over
        self.lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = items[self.shard :: self.of]
        self.attempts.rows.add(op="collected", path=str(self.shard), again=True, tests=[item.nodeid for item in mine])
        items[:] = [item for item in mine if self.attempts.waiting(item.nodeid)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.attempts.waiting(report.nodeid):
            self.attempts.end(report.nodeid, "failed", trace=str(report.longrepr), error="cannot be collected")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        if self.over():
            item.session.shouldstop = "time is up"
            return True
        self.attempts.begin(item.nodeid)
        self._reports: list[pytest.TestReport] = []
        done = yield
        self._end(item)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def _end(self, item: pytest.Item) -> None:
        failed = [report for report in self._reports if report.failed]
        skipped = [report for report in self._reports if report.skipped]
        if failed:
            sections = "\n".join(f"--- {title}\n{text[-3000:]}" for title, text in failed[0].sections)
            trace = f"{failed[0].longreprtext}\n{sections}"
            self.lost = context_is_lost()
            error = failed[0].longreprtext.strip().splitlines()[-1][:300]
            self.attempts.end(item.nodeid, "failed", trace=trace, error=error, when=failed[0].when, lost=self.lost)
            if self.lost:
                item.session.shouldstop = "the CUDA context is lost"
        elif skipped:
            why = skipped[0].longrepr
            self.attempts.end(item.nodeid, "skipped", why=str(why[2] if isinstance(why, tuple) else why)[:300])
        else:
            self.attempts.end(item.nodeid, "passed")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.lost:
            session.exitstatus = LOST
