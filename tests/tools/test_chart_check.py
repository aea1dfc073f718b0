"""What a chart's reader would stumble over is told, and ordinary charts are let alone."""

from __future__ import annotations

import runpy
import time
import warnings
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from tools.chart_check import problems
from tools.code import CodeTool


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    margins = {"figure.subplot.left": 0.15, "figure.subplot.right": 0.96, "figure.subplot.bottom": 0.18}
    with plt.rc_context({"figure.figsize": (4.8, 3.2), "figure.dpi": 72, **margins}):
        yield
    plt.close("all")


def told(code: str) -> list[str]:
    """The problems of the figure that some code draws."""
    np.random.seed(0)
    exec(code, {"plt": plt, "np": np, "pd": pd, "sns": sns})
    figure = plt.gcf()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.canvas.draw()
    return problems(figure, told=[str(w.message) for w in said])


GOOD = {
    "bars": "plt.bar(['a', 'b', 'c'], [1, 2, 3])\nplt.title('Three bars')\nplt.ylabel('count')",
    "horizontal bars": "plt.barh(['apples', 'pears', 'plums'], [1, 2, 3])\nplt.xlabel('kg')",
    "lines over dates": "plt.plot(pd.date_range('2024-01-01', periods=90), np.arange(90))\nplt.gcf().autofmt_xdate()",
    "labels on slanted ticks": "plt.bar(['January', 'February', 'March', 'April', 'May', 'June'], range(6))\n"
    "plt.xticks(rotation=45, ha='right')",
    "scatter with a legend": "plt.scatter([1, 2, 3], [3, 2, 1], label='points')\nplt.legend()",
    "pie": "plt.pie([3, 4, 5], labels=['one', 'two', 'three'], autopct='%1.0f%%')",
    "heat map": "sns.heatmap(np.random.rand(4, 4), annot=True)",
    "histogram": "plt.hist(np.random.randn(500), bins=20)\nplt.xlabel('value')\nplt.ylabel('count')",
    "boxes": "plt.boxplot([np.random.randn(50) for _ in range(4)])",
    "four charts": "f, a = plt.subplots(2, 2, figsize=(7, 5), layout='constrained')\n"
    "for i, x in enumerate(a.flat): x.plot(range(9)); x.set_title(f'part {i}'); x.set_xlabel('x')",
    "two scales": "plt.plot([1, 2, 3])\nplt.ylabel('left')\nplt.twinx().plot([30, 20, 10], 'r')\nplt.ylabel('right')",
    "polar": "plt.subplot(projection='polar').plot(np.linspace(0, 6, 50), np.linspace(0, 1, 50))",
    "a legend beside": "plt.plot([1, 2], label='a')\nplt.legend(loc='upper left', bbox_to_anchor=(1.02, 1))\n"
    "plt.tight_layout()",
    "log axes": "plt.loglog([1, 10, 100, 1000], [1, 5, 50, 500])",
    "bar labels": "plt.bar_label(plt.bar(['a', 'b', 'c'], [10, 20, 30]))",
    "seaborn's lines": "d = pd.DataFrame({'x': range(9), 'y': range(9), 'k': ['a', 'b', 'c'] * 3})\n"
    "sns.lineplot(d, x='x', y='y', hue='k')",
    "an image": "plt.imshow(np.random.rand(8, 8))\nplt.colorbar()",
    "in space": "plt.figure().add_subplot(projection='3d').plot([1, 2], [3, 4], [5, 6])",
    "only a table": "plt.axis('off')\nplt.table([['1', '2']], loc='center')",
    "annotations": "plt.plot([1, 4, 2])\nplt.annotate('the top', (1, 4), (1.4, 3.6), arrowprops={'arrowstyle': '->'})",
}


@pytest.mark.parametrize("code", GOOD.values(), ids=GOOD.keys())
def test_an_ordinary_chart_is_let_alone(code: str) -> None:
    assert told(code) == []


BAD = {
    "no axes": ("plt.figure()", "the figure is blank"),
    "nothing drawn": ("plt.subplots()", "the chart shows nothing: plot data there"),
    "one of two blank": ("f, (a, b) = plt.subplots(1, 2)\na.plot([1, 2])", "axes 2 of 2 shows nothing"),
    "no finite value": ("plt.plot([float('nan')] * 3)", "none of its values is a finite number"),
    "long labels side by side": (
        "plt.bar([f'a rather long label {i}' for i in range(6)], range(6))",
        "labels of the x axis overlap: rotate them",
    ),
    "steep but too many": (
        "plt.bar([f'label {i}' for i in range(80)], range(80))\nplt.xticks(rotation=60)",
        "labels of the x axis overlap",
    ),
    "too many rows": (
        "plt.barh([f'row {i}' for i in range(60)], range(60))",
        "labels of the y axis overlap: show fewer",
    ),
    "text over text": (
        "plt.plot([1, 2])\nplt.text(0.5, 1.5, 'a first remark')\nplt.text(0.52, 1.5, 'a second one')",
        "'a first remark' and 'a second one' overlap",
    ),
    "a title over a title": (
        "plt.plot([1])\nplt.suptitle('the whole figure', y=0.93)\nplt.title('the chart')",
        "'the chart' overlap",
    ),
    "tiny text": ("plt.plot([1, 2])\nplt.title('hardly there', fontsize=4)", "'hardly there' is 4 pixels high"),
    "a missing glyph": ("plt.plot([1])\nplt.title('a \\U00012000 sign')", "no font here has \U00012000"),
}


@pytest.mark.parametrize(("code", "expected"), BAD.values(), ids=BAD.keys())
def test_a_bad_chart_is_told_what_to_change(code: str, expected: str) -> None:
    found = told(code)
    assert any(expected in problem for problem in found), found


def test_text_that_is_cut_off_is_told() -> None:
    plt.plot([1, 2])
    plt.gcf().canvas.draw()
    assert "cut off" in problems(plt.gcf(), cut_off=True)[0]


def test_it_takes_little_time() -> None:
    told(
        "plt.bar([f'label {i}' for i in range(9)], range(9))\nplt.xticks(rotation=45)\nplt.title('t')\nplt.legend('a')"
    )
    figure = plt.gcf()
    seconds: dict[str, list[float]] = {"draw": [], "check": []}
    for _ in range(20):
        for name, work in (("draw", figure.canvas.draw), ("check", lambda: problems(figure))):
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    assert min(seconds["check"]) < min(seconds["draw"]) / 2


def test_the_tool_tells_it_with_the_figures_number() -> None:
    tool = CodeTool()
    try:
        one = tool.run({"code": "plt.subplots()"}).provenance
        two = tool.run({"code": "plt.plot([1])\nplt.subplots()"}).provenance
    finally:
        tool.close()
    assert one["warnings"] == ["the chart shows nothing: plot data there, or leave it out"]
    assert two["warnings"] == ["figure 2: the chart shows nothing: plot data there, or leave it out"]


def test_it_needs_nothing_of_the_project() -> None:
    assert "problems" in runpy.run_path("tools/chart_check.py")
