"""Charts are valid XML, and marks lie where their values are."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from compress.svg import Axis, Cell, Plot, axis_for, bars, grid, percent


def find(svg: str, tag: str, style: str = "") -> list[ET.Element]:
    return [x for x in ET.fromstring(svg).iter(tag) if not style or x.get("class") == style]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 10, ""), [0, 2, 4, 6, 8, 10]),
        (Axis(-0.3, 1.1, ""), [0, 0.5, 1]),
        (Axis(0.93, 1.01, ""), [0.94, 0.96, 0.98, 1.0]),
        (Axis(1e-6, 1, "", is_log=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (Axis(0.9, 60, "", is_log=True), [1, 2, 5, 10, 20, 50]),
        (Axis(8, 21, "", is_log=True), [10, 15, 20]),
    ],
)
def test_ticks_are_round_and_within(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("values", [[3.0], [0.0], [5.0, 5.0], [-2.0, 7.0]])
def test_an_axis_has_room_around_its_values(values: list[float]) -> None:
    axis = axis_for(values, "")
    assert axis.low < min(values) <= max(values) < axis.high
    assert axis.ticks()


def test_marks_lie_between_the_axes_in_proportion() -> None:
    plot = Plot(Axis(0, 10, "x"), Axis(1, 100, "y", is_log=True), width=200, height=100)
    plot.points([(0, 1), (5, 10), (10, 100)], "c0", ["low", "middle", "high"])
    low, middle, high = find(plot.draw("test"), "circle", "c0")
    for name in ("cx", "cy"):
        a, b, c = (float(point.get(name, "nan")) for point in (low, middle, high))
        assert b == pytest.approx((a + c) / 2, abs=0.1)
    assert float(low.get("cy", "nan")) > float(high.get("cy", "nan")), "up is more"
    assert [title.text for title in find(plot.draw("test"), "title")] == ["low", "middle", "high"]


def test_boxes_and_lines_have_their_size() -> None:
    plot = Plot(Axis(0, 4, ""), Axis(0, 2, "", write=percent), width=152 + 12, height=152)
    plot.box((1, 0), (3, 1), "c0")
    plot.line([(0, 0), (4, 2)], "l0")
    (box,) = find(plot.draw("test"), "rect")
    assert (float(box.get("width", 0)), float(box.get("height", 0))) == (50, 50)
    assert find(plot.draw("test"), "polyline", "l0")
    assert "100 %" in [text.text for text in find(plot.draw("test"), "text")]


def test_a_grid_has_a_cell_for_each_value() -> None:
    rows = [("down", [Cell("a", strength=0.25), Cell("b", "none")]), ("head", [Cell("c")])]
    svg = grid(rows, "test", "layer")
    assert [x.get("class") for x in find(svg, "rect")] == ["heat", "none", "heat"]
    assert [x.text for x in find(svg, "title")] == ["a", "b", "c"]
    assert [x.get("fill-opacity") for x in find(svg, "rect")] == ["0.25", "1.00", "1.00"]


def test_bars_are_as_long_as_their_values() -> None:
    widths = [float(x.get("width", 0)) for x in find(bars([("a", 4, "4"), ("b", 1, "1"), ("c", 0, "0")], "t"), "rect")]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
    assert widths[2] == 0


def test_names_are_escaped() -> None:
    svg = bars([("<b>&", 1, '"')], '"<')
    ET.fromstring(svg)
    assert "<b>" not in svg
