"""Contrast of the pages, by WCAG 2.1: texts have at least 4.5 : 1, lines and marks of charts 3 : 1."""

from __future__ import annotations

import tomllib

import pytest

from tests.conftest import ROOT
from workbench.dashboard import shell
from workbench.figures import COLORS, GRAY, model_colors
from workbench.figures.colors import HUES

TEXT, GRAPHICS = 4.5, 3.0  # WCAG 1.4.3 and 1.4.11
THEMES = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["theme"]
Color = tuple[float, float, float]


def parts(color: str) -> Color:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def luminance(color: Color) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(color: Color, other: Color) -> float:
    dark, light = sorted((luminance(color), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(color: Color, other: Color, share: float) -> Color:
    red, green, blue = (share * a + (1 - share) * b for a, b in zip(color, other, strict=True))
    return red, green, blue


def test_the_ratio_is_that_of_the_standard() -> None:
    assert contrast(parts("#000000"), parts("#ffffff")) == pytest.approx(21)
    assert contrast(parts("#777777"), parts("#ffffff")) == pytest.approx(4.48, abs=0.005)


def test_both_ways_to_start_the_dashboard_have_the_same_themes() -> None:
    served = ROOT / "workbench" / "dashboard" / "served" / ".streamlit" / "config.toml"
    assert tomllib.loads(served.read_text())["theme"] == THEMES
    assert set(THEMES) == {"light", "dark"}


@pytest.mark.parametrize("theme", THEMES)
def test_texts_can_be_read(theme: str) -> None:
    colors = {name: parts(color) for name, color in THEMES[theme].items()}
    texts = {name: color for name, color in colors.items() if not name.endswith("ackgroundColor")}
    assert {"textColor", "primaryColor", "linkColor", "grayTextColor", "redTextColor"} <= set(texts)
    for behind in ("backgroundColor", "secondaryBackgroundColor"):
        texts["quiet"] = mixed(colors["textColor"], colors[behind], shell.QUIET / 100)
        for name, color in texts.items():
            assert contrast(color, colors[behind]) >= TEXT, (name, behind)
    assert f"currentColor {shell.QUIET}%" in shell.STYLE
    assert shell.BUTTON in shell.STYLE
    assert contrast(parts("#ffffff"), parts(shell.BUTTON)) >= TEXT


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_marks_of_charts_can_be_seen(theme: str) -> None:
    behind = parts(THEMES[theme]["backgroundColor"])
    models = model_colors({f"v{i}": [f"v{i}-s{seed}" for seed in range(7)] for i in range(12)})
    drawn = {GRAY, *COLORS, *HUES, *models.values()}
    for color in drawn:
        assert contrast(parts(color), behind) >= GRAPHICS, color
