"""Estimate of the time left, progress that begins where an earlier run ended, and silence."""

import pytest

from engine.cli import progress
from engine.cli.progress import Estimate, clock, meter


class Clock:
    """Time in seconds that a test sets."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("first", "loading"), [(0.005, 5.0), (0.35, 0.0)])
def test_estimate_is_right_after_a_tenth(factor, first, loading):
    """To 30 %, in bursts of 4 %, after loading or a large first part, and when the forecast is wrong by ``factor``."""
    now, shares = Clock(), [first, *[0.04] * round((1 - first) / 0.04 - 1)]
    estimate = Estimate(1.0, 0.0, forecast=100.0, now=now)
    assert estimate.left == 100.0
    now.seconds = loading
    for share in shares:
        now.seconds += 100 * factor * share
        estimate.advance(share)
        if estimate.done >= 0.1:
            assert estimate.left == pytest.approx((1 - estimate.done) * 100 * factor, rel=0.3)
            before = estimate.left
            now.seconds += 1.0
            assert estimate.left == pytest.approx(max(0.0, before - 1.0))
            now.seconds -= 1.0


def test_estimate_of_the_rest_alone():
    """The rest of a render is forecast and measured; what an earlier run did is not."""
    now = Clock()
    estimate = Estimate(1.0, 0.8, forecast=20.0, now=now)
    assert (estimate.share, estimate.left) == (0.8, 20.0)
    for _ in range(4):
        now.seconds += 4.0
        estimate.advance(0.04)
    assert estimate.share == pytest.approx(0.96)
    assert estimate.left == pytest.approx(4.0, rel=0.1)


def test_estimate_without_a_forecast():
    now = Clock()
    estimate = Estimate(10.0, now=now)
    assert estimate.left is None
    now.seconds = 50.0
    estimate.advance(1.0)
    now.seconds = 52.0
    estimate.advance(2.0)
    assert estimate.left == pytest.approx((7 / 3) * 52, rel=0.01)
    estimate.advance(7.0)
    assert estimate.left == 0.0


def test_lines_begin_where_an_earlier_run_ended(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    with meter("rendering", 1.0, done=0.83, forecast=10.0) as bar:
        bar.advance(0.05, "step 2")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("rendering:  88%, 0:00 elapsed, 0:")
    assert first.endswith(" left, step 2")
    assert last.startswith("rendering: 100%, 0:00 elapsed, 0:00 left")


def test_quiet_is_silent_but_for_warnings(capsys, monkeypatch):
    monkeypatch.setattr(progress.console, "quiet", True)
    with meter("rendering", 1.0) as bar:
        bar.advance(1.0)
    progress.log("a note")
    progress.warn("something is wrong")
    assert capsys.readouterr().err == "warning: something is wrong\n"


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
