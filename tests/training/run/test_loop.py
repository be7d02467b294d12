"""The estimate of the remaining time."""

import pytest

from engine.training.run.events import Forecast
from engine.training.run.loop import Pace


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0], ids=["faster", "as forecast", "slower"])
@pytest.mark.parametrize("pause", [0.0, 2.0], ids=["iterations alone", "with checkpoints"])
def test_time_left_is_right_after_a_tenth(factor, pause):
    """Within 30 % at every later iteration, also where the forecast is wrong and checkpoints take a tenth of the time."""
    forecast = Forecast(name="step 1", iterations=(300, 200, 50), seconds=(0.1, 0.4, 2.0))
    now, times = 0.0, []
    pace = Pace(forecast, clock=lambda: now)
    for phase, total in enumerate(forecast.iterations):
        for iteration in range(1, total + 1):
            now += factor * forecast.seconds[phase] * (1 + 0.5 * (-1) ** iteration)
            if iteration % 20 == 0:
                now += pause * factor * forecast.seconds[phase]
            times.append((now, pace.seconds_left(phase, iteration), forecast.left(phase, iteration)))
    end = now
    for moment, left, expected in times:
        if expected < 0.9 * forecast.total and expected > 0.05 * forecast.total:
            assert left == pytest.approx(end - moment, rel=0.3)
    assert times[-1][1] == 0
    assert times[0][1] == pytest.approx(forecast.total, rel=0.1 + 0.1 * factor)


def test_resumed_part_counts_what_is_left():
    forecast = Forecast(name="step 2", iterations=(10, 10), seconds=(1.0, 2.0), preparation=5.0, position=(1, 4))
    assert forecast.total == 5 + 6 * 2
    assert forecast.left(0, 4) == 6 + 20
    assert forecast.left(2, 0) == 0
