"""Progress: lines off a terminal, at most one every so often; functions and silence as asked."""

from __future__ import annotations

import pytest

from moe_interp.progress import BETWEEN_LINES, FIRST_LINE, Lines, reporting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_long_work_writes_a_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines("scoring", clock=clock)
    for done in range(101):
        lines(done, 100)
        clock.now += 1
    lines.close()
    written = capsys.readouterr().err.splitlines()
    assert written[0] == "scoring: 5 of 100 (5%), 0:05, about 1:35 left"
    assert [line.split()[1] for line in written] == ["5", "35", "65", "95", "100"]
    assert written[-1] == "scoring: 100 of 100 (100%), 1:41"
    assert (FIRST_LINE, BETWEEN_LINES) == (5, 30)


def test_time_left_does_not_count_what_was_finished_before(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines("scoring", clock=clock)
    lines(80, 100)
    clock.now += 3600
    lines(90, 100)
    assert capsys.readouterr().err == "scoring: 90 of 100 (90%), 1:00:00, about 1:00:00 left\n"


def test_short_work_is_silent_unless_lines_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (None, False):
        with reporting("scoring", progress) as report:
            report(0, 2)
            report(2, 2)
    assert capsys.readouterr().err == ""
    with reporting("scoring", True) as report:
        report(0, 2)
        report(1, 2)
        report(2, 2)
    assert capsys.readouterr().err.splitlines() == ["scoring: 0 of 2 (0%), 0:00", "scoring: 2 of 2 (100%), 0:00"]
    seen = []
    with reporting("scoring", lambda *counts: seen.append(counts)) as report:
        report(1, 2)
    assert seen == [(1, 2)]


def _fail(label: str) -> None:
    with reporting(label, True) as report:
        report(0, 2)
        report(1, 2)
        raise RuntimeError


def test_work_that_fails_writes_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        _fail("scoring")
    assert capsys.readouterr().err.splitlines() == ["scoring: 0 of 2 (0%), 0:00"]
