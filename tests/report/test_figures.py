"""The acceptance figure is a PNG of the expected size; what it shows is looked at by people."""

from __future__ import annotations

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from hyperdflash.report.figures import DPI, WIDTH_IN, label_lines, results_figure
from hyperdflash.report.measure import measure


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0)])
def test_acceptance_png(make_results, tmp_path, temperatures):
    found = measure(make_results(temperatures=temperatures), baseline="MTP (6)", num_resamples=50)
    path = results_figure(found, tmp_path / "figures" / "acceptance.png", "Acceptance")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert width == WIDTH_IN * DPI
    assert 600 * len(temperatures) < height < 900 * len(temperatures)
    assert image[..., :3].std() > 0.05  # not blank


def test_figures_draw_undefined_slots_and_methods_without_runs(make_results, tmp_path):
    rates = {"a": (0.05,) * 6, "b": (0.9, 0.8)}
    results = make_results(temperatures=(1.0,), per_domain=(3,), rates=rates, run_ids=False)
    path = results_figure(measure(results, num_resamples=20), tmp_path / "acceptance.png", "Acceptance")
    assert path.stat().st_size > 10_000


def test_lines_are_named_from_the_highest_down():
    axis = Figure().subplots()
    label_lines(axis, [(1, 0.2, "low", "red", "o"), (1, 0.9, "high", "blue", "s"), (1, 0.5, "middle", "green", "^")])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["high", "middle", "low"]
