"""The growth picture: exponents of known powers, and lines where the points say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import growth, growth_picture


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent_of_a_power(power: float) -> None:
    sizes = [512, 2048, 8192]
    assert growth.exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power)


def test_labels_are_powers_of_ten() -> None:
    assert [growth_picture.label(power) for power in (-2, 0, 3, 5)] == ["0.01", "1", "1,000", "1e5"]


def test_a_panel_for_each_kind_of_size() -> None:
    def line(panel: str, values: list[float]) -> dict[str, object]:
        return {"panel": panel, "name": "s", "x": [1, 10, 100], "y": values, "exponent": 1.0}

    found = {
        "step": {"series": [line("tokens", [1, 10, 100]), line("tokens", [1, 1, 1])]},
        "real": {"series": [line("ranks", [5, 5, 5])]},
    }
    assert list(growth_picture.panels_of(found)) == ["tokens", "ranks"]
    pixels = np.asarray(growth_picture.picture(found))
    width, height = growth_picture.WIDTH, growth_picture.HEIGHT
    assert pixels.shape == (height, 3 * width, 3)
    blue = np.array([31, 95, 168])
    for column, has_lines in enumerate((True, True, False)):
        panel = pixels[:, column * width : (column + 1) * width]
        assert (panel == blue).all(axis=-1).any() == has_lines
    # The rising line ends in the upper right corner of its box, the level one below.
    corner = pixels[growth_picture.TOP - 3 : growth_picture.TOP + 4, width - growth_picture.RIGHT]
    assert (corner == blue).all(axis=-1).any()
