"""charts.py: values at the pixels that the axes compute, round numbers, and a legend that covers nothing."""

import numpy as np
import pytest

import charts
from charts import COLOURS, Axis, Chart, Series, draw, frame_of, line


def axes(chart):
    xs = [x for series in chart.series for x in series.x]
    ys = [value for series in chart.series for seeds in series.y for value in seeds]
    frame = frame_of(chart)
    return (Axis(xs, frame.left, frame.right, chart.log_x), Axis(ys, frame.bottom, frame.top, chart.log_y))


def colour_at(picture, x, y):
    return "#{:02X}{:02X}{:02X}".format(*picture.getpixel((round(x), round(y))))


def test_charts_show_every_value_where_its_axis_says():
    """Marks are found at the pixels that the axes compute, in the colour of their series."""
    chart = Chart("t", "x", "y", [Series("a", [1, 10, 100], [[1.0], [10.0], [100.0]]),
                                  Series("b", [1, 100], [[50.0], [8.0]])], True, True)
    picture = draw(chart)
    across, up = axes(chart)
    assert across(10) == pytest.approx((across(1) + across(100)) / 2)
    assert up(10) == pytest.approx((up(1) + up(100)) / 2)
    for x, y, colour in ((1, 1, 0), (10, 10, 0), (1, 50, 1), (100, 8, 1)):
        assert colour_at(picture, across(x), up(y)) == COLOURS[colour], (x, y)


def test_a_missing_value_is_a_gap_in_the_line():
    for middle in ([2.0], []):
        chart = Chart("t", "x", "y", [Series("", [1, 2, 3, 4], [[3.0], middle, [2.0], [1.0]], charts.GREEN)])
        picture = draw(chart)
        across, up = axes(chart)
        assert (colour_at(picture, across(1.5), up(2.5)) == charts.GREEN) == bool(middle)
        assert (colour_at(picture, across(2.5), up(2.0)) == charts.GREEN) == bool(middle)
        assert colour_at(picture, across(3.5), up(1.5)) == charts.GREEN


def test_a_mark_is_the_mean_of_the_seeds_and_a_bar_their_range():
    chart = Chart("t", "x", "y", [Series("", [0.0, 1.0], [[1.0, 2.0, 6.0], [1.0]], charts.GREEN)])
    picture = draw(chart)
    across, up = axes(chart)
    for value in (1.2, 3.0, 5.8):
        assert colour_at(picture, across(0), up(value)) == charts.GREEN
    mark = [dx for dx in range(-30, 31) if colour_at(picture, across(0) + dx, up(3.0)) == charts.GREEN]
    bar = [dx for dx in range(-30, 31) if colour_at(picture, across(0) + dx, up(5.0)) == charts.GREEN]
    assert len(mark) > 2 * len(bar) > 4


@pytest.mark.parametrize("low, high, log", [
    (0.3, 40, True), (1, 50, True), (0.52, 0.61, True), (1e5, 9e8, True), (4.1, 5.3, False), (0, 1, False),
    (0.012, 0.019, False), (-1, 1, False), (100, 4000, False), (3, 3, False)])
def test_ticks_are_a_few_round_numbers_on_the_axis(low, high, log):
    axis = Axis([low, high], 0, 100, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert all(0 <= axis(value) <= 100 for value in ticks)
    assert all(float(charts.number(value)) == pytest.approx(value, rel=0.05) for value in ticks)


def test_ticks_are_those_of_the_points_where_these_are_few_and_short():
    assert Axis([0.25, 4], 0, 100, True).ticks([4, 0.25, 0.5, 1, 2, 0.5]) == [0.25, 0.5, 1, 2, 4]
    assert Axis([1, 256], 0, 100, True).ticks([1, 4, 16, 64, 256]) == [1, 4, 16, 64, 256]
    for values in ([1, 2], list(range(1, 12)), [0.12345, 1.5, 2.5]):        # too few, too many, too long
        assert Axis(values, 0, 100, False).ticks(values) == Axis(values, 0, 100, False).ticks()


def test_a_legend_covers_no_point():
    """In a free corner of the axes, or beside them where lines reach all four corners."""
    low, high = Series("low", [1, 2], [[1.0], [1.0]]), Series("high", [1, 2], [[9.0], [9.0]])
    for series, beside in (([low], False), ([low, high], True)):
        chart = Chart("t", "x", "y", series)
        picture = np.asarray(draw(chart))
        legend = np.nonzero((picture == 0xbb).all(-1).sum(0) > 30)[0]        # the sides of its outline
        bottom = picture[frame_of(chart).bottom]                     # the row of the horizontal axis
        axis = np.nonzero((bottom == 0).all(-1))[0]
        assert legend.size and (legend.min() > axis.max()) == beside and legend.max() < chart.size[0]
        for colour in COLOURS[:len(series)]:                         # each line is there from end to end
            rgb = [int(colour[k:k + 2], 16) for k in (1, 3, 5)]
            columns = np.nonzero((picture == rgb).all(-1).any(0))[0]
            assert columns.max() - columns.min() > 0.85 * (axis.max() - axis.min())


def test_no_mark_stands_beside_the_legend_as_if_it_were_its_own():
    chart = Chart("t", "x", "y", [line("a name", [(0.0, 0.0), (1.0, 1.0)])])
    frame = frame_of(chart)
    left, top, right, bottom = charts.legend_box(chart, frame, [])
    middle = (top + bottom) / 2
    assert charts.legend_box(chart, frame, [(left - 200, middle)])[0] == left
    assert charts.legend_box(chart, frame, [(left - 20, middle)])[0] < left - 200


def test_places_lie_side_by_side_and_empty_charts_are_refused():
    chart = Chart("t", "x", "y", [Series(name, ["p", "q"], [[1.0, 3.0], [2.0]]) for name in ("a", "b")])
    picture = np.asarray(draw(chart))
    for colour in COLOURS[:2]:
        rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        assert (picture == rgb).all(-1).sum() > 500
    for series in ([], [line("a", [(1.0, float("nan"))])]):
        with pytest.raises(ValueError, match="chart 't': has no point"):
            draw(Chart("t", "x", "y", series))


def test_what_is_not_finite_is_left_out_and_what_is_empty_is_not_named():
    nan = float("nan")
    assert line("a", [(1.0, 2.0), (2.0, nan), (nan, 1.0), (3.0, 4.0)])[1:3] == ([1.0, 3.0], [[2.0], [4.0]])
    full = line("full", [(1.0, 2.0), (3.0, 4.0)], COLOURS[0])
    alone = draw(Chart("t", "x", "y", [full]))
    assert draw(Chart("t", "x", "y", [full, line("empty", [])])).tobytes() == alone.tobytes()


@pytest.mark.parametrize("points, free", [
    ([(0, 0.0), (10, 1.0)], "left"),                       # rising: the upper right corner is taken
    ([(0, 1.0), (10, 0.0)], "right"),
    ([(0, 0.0), (7.5, 1.0), (10, 0.9)], "left"),           # without a mark in that corner
])
def test_the_legend_covers_no_line(points, free):
    """Nor a mark; a line has marks at its ends alone."""
    dense = [(x, np.interp(x, *zip(*points))) for x in np.linspace(0, 10, 60)]
    chart = Chart("t", "x", "y", [line("a name of some length", points, COLOURS[0])])
    picture = draw(chart)
    across, up = axes(chart)
    assert all(colour_at(picture, across(x), up(y)) == COLOURS[0] for x, y in dense[1:-1])
    outline = np.argwhere((np.asarray(picture) == 0xbb).all(-1))
    middle = outline[:, 1].mean()
    assert (middle < 800) == (free == "left") and outline[:, 0].mean() < 450


def test_a_heat_map_is_white_where_even_vermillion_below_and_blue_above():
    picture = charts.heat_map("t", [("a", [1.0, 0.0, 2.0]), ("b", [9.0, 0.5, 1.0])], text=15)
    colours = {count_colour[1] for count_colour in picture.getcolors(100_000)}
    assert (0x00, 0x72, 0xB2) in colours and (0xD5, 0x5E, 0x00) in colours
    assert (234, 174, 128) in colours                     # halfway between white and vermillion
    assert picture.height == 45 + 2 * 30 + 15
