"""The rule of how far an estimate may be off, and that every prediction says it."""

import pytest

from tulu_jax.planning import calibration
from tulu_jax.planning.cost import Cost


def test_errors_are_explained_by_the_part_that_weighs():
    """Waits of a tenth of the time that are off by half leave 5 %; a point without waits says
    nothing of them."""
    assert calibration.explained_by([0.1, 0.2], [0.05, -0.1]) == pytest.approx(0.5)
    assert calibration.explained_by([0.0, 0.2], [0.0, -0.1]) == pytest.approx(0.5)


def test_a_point_knows_its_error_and_share():
    point = calibration.Point("run", measured=11.0, predicted=10.0, waits=2.0)
    assert point.error == pytest.approx(0.1) and point.share == 0.2


@pytest.mark.parametrize("point", calibration.POINTS, ids=lambda point: point.name)
def test_points_lie_within_their_own_band(point):
    cost = Cost(matrix=point.predicted - point.waits, interconnect=point.waits)
    low, high = calibration.band(cost).of(point.predicted)
    assert low < point.measured < high
    assert not calibration.band(cost).extrapolated


def test_the_band_is_narrow_where_products_bind_and_wide_where_the_interconnect_does():
    bands = [calibration.band(Cost(matrix=1 - s, interconnect=s)) for s in (0.0, 0.3, 0.6)]
    widths = [band.high - band.low for band in bands]
    assert bands[0].high == pytest.approx(1 + 2 * calibration.COMPUTE)
    assert bands[0].low == pytest.approx(1 - 2 * calibration.COMPUTE)
    assert widths == sorted(widths) and widths[2] > 2 * widths[0]
    assert bands[2].extrapolated and not bands[0].extrapolated


def test_waits_are_never_less_than_nothing(monkeypatch):
    monkeypatch.setattr(calibration, "WAITS", 3.0)
    band = calibration.band(Cost(matrix=1.0, interconnect=1.0))
    assert band.low == 0.5 and band.high == 4.0
    assert band.of(10.0) == (5.0, 40.0)


def test_no_time_is_exact():
    assert calibration.band(Cost()).of(0.0) == (0.0, 0.0)
