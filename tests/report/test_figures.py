"""The acceptance figure is a PNG of the expected size; what it shows is looked at by people."""

from __future__ import annotations

import matplotlib.image
import pytest

from hyperdflash.report.acceptance import replay_results
from hyperdflash.report.figures import DPI, WIDTH_IN, results_figure, spread_labels


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0)])
def test_acceptance_png(make_results, tmp_path, temperatures):
    found = replay_results(make_results(temperatures=temperatures), baseline="MTP (6)", num_resamples=50)
    path = results_figure(found.results, tmp_path / "figures" / "acceptance.png", "Acceptance")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert width == WIDTH_IN * DPI
    assert 600 * len(temperatures) < height < 900 * len(temperatures)
    assert image[..., :3].std() > 0.05  # not blank


def test_figures_draw_undefined_slots_and_methods_without_runs(make_results, tmp_path):
    rates = {"a": (0.05,) * 6, "b": (0.9, 0.8)}
    results = make_results(temperatures=(1.0,), per_domain=(3,), rates=rates, run_ids=False)
    path = results_figure(replay_results(results, "a", 20).results, tmp_path / "acceptance.png", "Acceptance")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("heights", "placed"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5, 0.6], [0.5, 0.6, 0.7]),
        ([-0.2, 0.0], [0.0, 0.1]),
        ([0.95, 0.98, 1.0], [0.8, 0.9, 1.0]),
        ([0.0] * 13, [0.1 * i for i in range(13)]),  # more than fit: apart all the same
    ],
)
def test_labels_lie_apart(heights, placed):
    assert spread_labels(heights, 0.1) == pytest.approx(placed)
