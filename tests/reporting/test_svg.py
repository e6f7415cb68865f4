"""The charts: well-formed, inside their frame, no line across a missing run, spikes kept."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loralab.reporting import svg

finite = st.floats(-1e6, 1e6)


def point(x, *values):
    mean = sum(values) / len(values)
    return svg.Point(x, mean, list(values), 0.1 if len(values) > 1 else None, "<tip & text>")


def drawn(series, **more):
    x = svg.powers("r", [2.0, 4.0, 8.0])
    return svg.chart(series, x, svg.scale("val/loss", [1.0, 2.0]), **more)


def test_a_chart_is_well_formed_and_escapes_its_texts():
    text = drawn([svg.Series("a<b", [point(2.0, 1.0, 1.2), point(4.0, 1.5)], 0)], description='"x" & <y>')
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == '"x" & <y>'
    assert "<tip & text>" in [node.text for node in root.iter("title")]


def test_powers_of_two_are_evenly_spread():
    axis = svg.powers("r", [2.0, 4.0, 8.0])
    assert axis.share(4.0) - axis.share(2.0) == pytest.approx(axis.share(8.0) - axis.share(4.0))
    assert [name for _, name in axis.ticks] == ["2", "4", "8"]


def test_no_line_is_drawn_across_a_missing_run():
    whole = drawn([svg.Series("a", [point(2.0, 1.0), point(4.0, 1.5), point(8.0, 2.0)], 0)])
    broken = drawn([svg.Series("a", [point(2.0, 1.0), None, point(8.0, 2.0)], 0)])
    assert whole.count("<polyline") == 1
    assert broken.count("<polyline") == 0


def test_every_seed_is_a_point_and_bars_span_one_deviation():
    text = drawn([svg.Series("a", [point(2.0, 1.1, 1.3, 1.5)], 0)])
    assert text.count('class="seed') == 3
    low, high = (float(v) for v in re.search(r'class="bar c0".* y1="(.*?)".* y2="(.*?)"', text).groups())
    canvas = svg.Canvas(svg.powers("r", [2.0]), svg.scale("", [1.0, 2.0]))
    assert abs(high - low) == pytest.approx(abs(canvas.py(1.2) - canvas.py(1.4)), abs=0.11)


@given(st.lists(finite, min_size=1, max_size=8))
@example([0.0, 1.6330092163198044e-09])  # ticks at multiples of 5e-10
def test_a_scale_holds_its_values_and_has_ticks_inside(values):
    axis = svg.scale("y", values)
    assert axis.low < min(values) <= max(values) < axis.high
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low - 1e-6 <= at <= axis.high + 1e-6 for at, _ in axis.ticks)
    names = [name for _, name in axis.ticks]
    assert len(set(names)) == len(names)


def test_training_steps_have_no_tick_before_the_first():
    assert all(1 <= at <= 60 for at, _ in svg.steps("step", [1.0, 60.0]).ticks)


@given(st.lists(finite, min_size=1, max_size=300), st.integers(2, 50))
def test_downsampling_keeps_the_extremes_and_the_order(values, limit):
    rows = [(float(index), value) for index, value in enumerate(values)]
    kept = svg.downsample(rows, limit)
    assert len(kept) <= max(limit, 2)
    assert kept == sorted(kept)
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)


def test_a_spike_survives_in_a_long_curve():
    rows = [(float(step), 1.0) for step in range(100_000)]
    rows[77_777] = (77_777.0, 50.0)
    assert (77_777.0, 50.0) in svg.downsample(rows, svg.MAX_POINTS)


def test_the_exponential_mean_of_a_constant_is_the_constant():
    curve = svg.Curve("a", [(float(step), 3.0) for step in range(5)], 0)
    axis = svg.scale("y", [2.0, 4.0])
    text = svg.line_plot([curve], svg.steps("step", [0.0, 4.0]), axis, smooth=0.9)
    raw, smooth = re.findall(r'points="(.*?)"', text)
    assert raw == smooth


def test_a_curve_stays_inside_the_frame_even_where_it_spikes():
    curve = svg.Curve("a", [(0.0, 1.0), (1.0, 1e9)], 0)
    text = svg.line_plot([curve], svg.steps("step", [0.0, 1.0]), svg.scale("y", [1.0, 2.0]))
    places = [float(y) for y in re.findall(r",([-\d.]+)", re.search(r'points="(.*?)"', text).group(1))]
    assert min(places) >= svg.TOP - 0.1
    assert all(math.isfinite(place) for place in places)


def test_long_names_below_the_axis_wrap_instead_of_running_into_each_other():
    names = ["q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj", "all-linear", "x", "y"]
    text = svg.chart([], svg.places("targets", names), svg.scale("y", [1.0, 2.0]))
    words = [node.text for node in ElementTree.fromstring(text).iter("text")]
    assert "".join(words[-13:]).count("proj") >= 1
    assert max(len(word) for word in words) <= 16


def test_marks_of_other_shapes_tell_a_second_axis_apart():
    x, y = svg.powers("bits", [4.0, 8.0]), svg.scale("y", [1.0, 2.0])
    points = [svg.Point(4.0, 1.5, [1.5], shape=shape) for shape in (0, 1, 2)]
    root = ElementTree.fromstring(svg.scatter([svg.Series("nf4", points, 3)], x, y))
    marks = [next(node for node in group if node.tag != "title").tag for group in root.iter("g")]
    assert marks == ["circle", "rect", "polygon"]
    assert {group.attrib["class"] for group in root.iter("g")} == {"c3 mean"}


def test_curves_of_one_colour_differ_by_their_style_and_a_broken_one_ends_in_a_cross():
    rows = [(0.0, 1.0), (1.0, 1.5)]
    curves = [svg.Curve("a", rows, 0, style=svg.DASHES[1]), svg.Curve("b", rows, 0, broken=True)]
    text = svg.line_plot(curves, svg.steps("step", [0.0, 1.0]), svg.scale("y", [1.0, 2.0]))
    assert text.count("stroke-dasharray") == 1
    assert text.count('<line class="bar c0"') == 2


def centres(text):
    """Of every mark in an SVG of ours: the middle of its shape, rounded as written."""
    found = []
    for group in ElementTree.fromstring(text).iter("g"):
        shape = next(node for node in group if node.tag != "title")
        if shape.tag == "circle":
            found.append((float(shape.attrib["cx"]), float(shape.attrib["cy"])))
        elif shape.tag == "rect":
            half = float(shape.attrib["width"]) / 2
            found.append((float(shape.attrib["x"]) + half, float(shape.attrib["y"]) + half))
        else:
            corners = [tuple(map(float, pair.split(","))) for pair in shape.attrib["points"].split()]
            found.append((corners[0][0], sum(y for _, y in corners) / len(corners)))
    return found


def test_marks_of_every_shape_stand_at_their_values():
    x, y = svg.Axis("bits", 4.0, 32.0, [(8.0, "8")], log2=True), svg.scale("y", [1.0, 2.0])
    points = [svg.Point(8.127, 1.25 + 0.1 * shape, [1.2, 1.3], 0.1, shape=shape) for shape in range(3)]
    text = svg.scatter([svg.Series("nf4", points, 3)], x, y)
    canvas = svg.Canvas(x, y)
    for point, (px, py) in zip(points, centres(text), strict=True):
        assert px == pytest.approx(canvas.px(point.x), abs=0.11)
        assert py == pytest.approx(canvas.py(point.mean), abs=0.11)
    seeds = [node for node in ElementTree.fromstring(text).iter("circle") if "seed" in node.attrib.get("class", "")]
    assert {float(node.attrib["cx"]) for node in seeds} == {round(canvas.px(8.127), 1)}


def test_series_over_numbers_stand_at_their_numbers_and_over_names_side_by_side():
    several = [svg.Series(name, [point(4.0, 1.0 + hue / 9)], hue) for hue, name in enumerate("abc")]
    place = svg.Canvas(svg.powers("r", [2.0, 4.0, 8.0]), svg.scale("", [1.0, 2.0])).px(4.0)
    assert [px for px, _ in centres(drawn(several, joined=True))] == pytest.approx([place] * 3, abs=0.11)
    named = svg.chart(several, svg.places("q", ["x", "y", "z", "u", "v"]), svg.scale("", [1.0, 2.0]), joined=False)
    assert len({px for px, _ in centres(named)}) == 3


NAMES = ["none", "int8_absmaxzeropoint_tensor", *(f"int8_absmaxzeropoint_{n}" for n in range(9))]


def labels(text):
    return [node for node in ElementTree.fromstring(text).iter("text") if "tick" in node.attrib["class"]]


def test_long_names_below_an_axis_are_set_aslant_whole_and_inside_the_drawing():
    text = svg.chart([], svg.places("quantization", NAMES), svg.scale("y", [1.0, 2.0]))
    aslant = [node for node in labels(text) if "transform" in node.attrib]
    assert [node.text for node in aslant] == NAMES
    tall = float(ElementTree.fromstring(text).attrib["viewBox"].split()[3])
    deepest = max(
        float(node.attrib["y"]) + svg.LETTER * len(node.text) * math.sin(math.radians(svg.SLANT)) for node in aslant
    )
    assert deepest < tall - 16  # the axis' title has the last line


def test_labels_of_numbers_do_not_lie_on_each_other():
    ticks = [(at, f"{at:g}") for at in (4, 4.25, 4.5, 5, 6, 8, 16, 24)]
    x = svg.Axis("bits", 4.0, 24.0, ticks, log2=True)
    found = [
        node for node in labels(svg.scatter([], x, svg.scale("y", [1.0, 2.0]))) if "middle" in node.attrib["class"]
    ]
    ends = [(float(node.attrib["x"]), len(node.text) * svg.LETTER / 2) for node in found]
    assert len(found) >= 5
    assert all(b - d > a + c for (a, c), (b, d) in pairwise(ends))


def test_a_mark_alone_at_its_name_stands_over_it():
    series = [svg.Series(name, [svg.Point(float(at), 1.5, [1.5])], at) for at, name in enumerate("abc")]
    text = svg.chart(series, svg.places("bits", ["4.1", "4.5", "8"]), svg.scale("y", [1.0, 2.0]), joined=False)
    marks = [float(node.attrib["cx"]) for node in ElementTree.fromstring(text).iter("circle")]
    names = [float(node.attrib["x"]) for node in labels(text) if "middle" in node.attrib["class"]]
    assert marks[0] == names[0]


@pytest.mark.parametrize("last", [1, 3, 4, 7, 60, 1234])
def test_steps_are_whole(last):
    names = [name for _, name in svg.steps("step", [1.0, float(last)]).ticks]
    assert names == [str(int(name)) for name in names]
    assert len(set(names)) == len(names) >= 2
