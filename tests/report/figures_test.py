"""Figures: the right numbers, bands of seeds, and lines on each other are all seen."""

import io

import numpy as np
import report_fixtures as made

from qlog.report import figures, groups, read


def experiments(tmp_path, *runs):
    """(variants, seed, curve) -> groups."""
    for index, (variants, seed, curve) in enumerate(runs):
        config = made.paper_config("finqa", variants, seed)
        made.finished(tmp_path / f"run{index}", config, 0.5, curve=curve)
    return groups.group(read.read(read.find([str(tmp_path)])))


def test_a_line_is_what_the_log_says_at_steps_that_all_seeds_have(tmp_path):
    found = experiments(
        tmp_path,
        ("cold,garl,q=0.75", 0, [0.0, 0.1, 0.2]),
        ("cold,garl,q=0.75", 1, [0.2, 0.3]),
        ("cold,garl,q=1", 0, [0.5, "nan", 0.7]),
    )
    lines = figures.figure3(found)[0].lines
    assert [line.label for line in lines] == ["garl(q=0.75) (2 seeds)", "garl(q=1.0)"]
    np.testing.assert_array_equal(lines[0].steps, [1, 2])
    np.testing.assert_allclose(lines[0].values, [[0.0, 0.1], [0.2, 0.3]])
    np.testing.assert_array_equal(lines[1].steps, [1, 3])


def test_lines_that_lie_on_each_other_are_all_seen(tmp_path):
    flat = [0.0] * 100
    found = experiments(
        tmp_path,
        *((f"cold,garl,q={q}", 0, flat) for q in (0, 0.25, 0.5, 0.75, 1)),
        ("cold,grpo", 0, flat),
    )
    pictures = figures.draw(figures.figure3(found))
    assert pictures["svg"].startswith(b"<?xml") and b"<path" in pictures["svg"]
    from matplotlib import image

    pixels = image.imread(io.BytesIO(pictures["png"]))[..., :3]
    # Only the axes: the legend below them shows every colour anyway.
    pixels = pixels[: int(0.7 * len(pixels))]
    for colour in figures.COLOURS[:6]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels - wanted).max(-1) < 0.03).sum() > 40, colour


def test_nothing_to_draw_is_no_picture(tmp_path):
    assert figures.draw(figures.figure3(experiments(tmp_path, ("cold,grpo", 0, [])))) == {}
    assert figures.draw(figures.escape([])) == {}


def test_many_lines_differ_in_colour_or_dash():
    styles = [figures.style_of(index) for index in range(28)]
    assert len({(style.colour, style.dash) for style in styles}) == 28
    assert all(figures.style_of(i)[2] != figures.style_of(i + 7)[2] for i in range(7))
