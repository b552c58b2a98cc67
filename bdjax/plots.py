"""Figures from arrays: one function a kind, each returns a matplotlib `Figure`.

All share one style: narrow enough for a phone, colours that colour-blind readers can tell apart
(Okabe & Ito), markers and line styles beside them. Blue is what is clean or accurate, vermilion
what is trojaned or an attack's success.
"""

import contextlib
import functools
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from bdjax.types import class_name

CLEAN, TROJAN = "#0072B2", "#D55E00"
COLORS = (CLEAN, TROJAN, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#5f6368"
MARKERS = "os^DvPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
WIDTH = 4.8
"""Inches: at 96 pixels an inch, little more than a phone's width."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
}


@contextlib.contextmanager
def any_letter() -> Iterator[None]:
    """Letters that the font lacks, of anyone's names, are boxes, and nothing is said of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ", UserWarning)
        yield


def styled(fn: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the style above, and leaves the user's settings alone."""

    @functools.wraps(fn)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return fn(*args, **kwargs)

    return drawn


def _axes(height: float = 3.0, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _percent(axis: Any, whole: bool = True) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if whole else None))


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        room = axes.figure.get_figwidth() * 12.5  # type: ignore[union-attr]
        sizes = [len(label) + 6 for label in labels]
        columns = len(labels) if sum(sizes) <= room else max(1, int(room / max(sizes)))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)  # type: ignore[union-attr]


def _log_x(axes: Axes, values: Any) -> None:
    """A logarithmic x-axis with ticks at those of `values` that stand far enough apart
    to be read.
    """
    ticks = np.unique(np.asarray(values, np.float64))
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if np.log(tick / kept[-1]) >= np.log(ticks[-1] / ticks[0]) / 10:
            kept.append(tick)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


# --- Pictures ---


@styled
def images(
    pictures: Any, rows: Sequence[str] = (), columns: Sequence[str] = (), cell: float = 0.85
) -> Figure:
    """A grid of `pictures: [R, C, H, W, 1 or 3]` in [0, 1]; NaN pictures stay empty. `cell`: inches
    a picture.
    """
    pictures = np.asarray(pictures, np.float32)
    count, across = pictures.shape[:2]
    side = max((len(text) for text in rows), default=0) * 0.075
    lines = 1 + max((text.count("\n") for text in columns), default=0)
    height = count * (cell * pictures.shape[2] / pictures.shape[3] + 0.06) + 0.05
    height += 0.17 * lines + 0.05 if columns else 0
    figure = Figure((side + across * (cell + 0.06) + 0.1, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)  # type: ignore[union-attr]
    grid = figure.subplots(count, across, squeeze=False)
    for i, j in np.ndindex(count, across):
        axes: Any = grid[i, j]
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if np.isfinite(pictures[i, j]).all():
            _picture(axes, pictures[i, j])
        if i == 0 and j < len(columns):
            axes.set_title(columns[j], fontsize=9, pad=3)
        if j == 0 and i < len(rows):
            axes.set_ylabel(rows[i], rotation=0, ha="right", va="center", fontsize=9, labelpad=4)
    return figure


def _picture(axes: Axes, picture: np.ndarray) -> None:
    picture = np.clip(picture, 0, 1)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    axes.imshow(
        picture,
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(0, 1, 0, 1),
        aspect=picture.shape[0] / picture.shape[1],
    )


def stamped(clean: Any, trojan: Any, titles: Sequence[str] = ()) -> Figure:
    """Clean images, the same stamped, and |difference|, scaled up where it is faint. `clean,
    trojan: [N, H, W, C]`.
    """
    clean, trojan = np.asarray(clean, np.float32), np.asarray(trojan, np.float32)
    gap = np.abs(trojan - clean)
    largest = float(np.nan_to_num(gap).max())  # an attack may make anything
    factor = max(1, int(1 / max(largest, 1e-3)))
    names = ("clean", "stamped", "difference" if factor == 1 else f"difference ×{factor}")
    return images(np.stack([clean, trojan, gap * factor]), names, titles)


@styled
def triggers(
    mask: Any,
    pattern: Any,
    l1: Any,
    labels: Sequence[Any] = (),
    marked: Any = None,
    across: int = 5,
    names: Sequence[str] = (),
) -> Figure:
    """Reversed triggers mask·pattern and their L1. `mask: [K, H, W, 1]`, `pattern: [K, H, W, C]`,
    `marked: [K]`. They are called by `labels`, or those of all classes by the classes' `names`.
    """
    mask, pattern, l1 = (
        np.asarray(mask, np.float32),
        np.asarray(pattern, np.float32),
        np.asarray(l1),
    )
    count = len(l1)
    labels = labels or [class_name(k, names) if names else f"label {k}" for k in range(count)]
    marked = np.zeros(count, bool) if marked is None else np.asarray(marked, bool)
    across = min(across, count)
    down = -(-count // across)
    figure = Figure((across * 0.95 + 0.1, down * 1.3 + 0.05), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for k, axes in enumerate(grid):
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if k < count:
            _picture(axes, mask[k] * pattern[k])
            title = textwrap.fill(str(labels[k]), 14, break_long_words=False)
            axes.set_title(f"{title}\nL1 {l1[k]:.1f}", fontsize=9,
                           color=TROJAN if marked[k] else "black", pad=4,
                           fontweight="bold" if marked[k] else "normal")  # fmt: skip
            if marked[k]:
                axes.spines[:].set(visible=True, color=TROJAN, linewidth=2.5)
    return figure


# --- Curves ---


@styled
def curves(
    x: Sequence[Any],
    lines: Mapping[str, Any],
    spread: Mapping[str, Any] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    percent: bool = False,
    mark: float | None = None,
    mark_label: str = "chosen",
    colors: Sequence[str] = COLORS,
) -> Figure:
    """Lines over `x: [X]`, numbers or names.

    A line is `[X]`, with its `spread: [X]` (± s.d.) or `[2, X]` (low, high), or `[R, X]`: R seeds,
    drawn as their mean and range. `mark`: a place on the x-axis worth a dashed line.
    """
    figure, axes = _axes(3.2)
    named = not all(isinstance(value, (int, float, np.number)) for value in x)
    at = np.arange(len(x)) if named else np.asarray(x, np.float64)
    for i, (name, values) in enumerate(lines.items()):
        values = np.asarray(values, np.float64)
        band = (
            None if spread is None or name not in spread else np.asarray(spread[name], np.float64)
        )
        if values.ndim == 2:
            values, band = (
                values.mean(0),
                np.stack([values.min(0), values.max(0)]) if len(values) > 1 else None,
            )
        color, style = colors[i % len(colors)], DASHES[i % len(DASHES)]
        many = len(at) > 25
        axes.plot(
            at,
            values,
            color=color,
            linestyle=style,
            marker="" if many else MARKERS[i % len(MARKERS)],
            label=name,
        )
        if band is not None:
            low, high = band if band.ndim == 2 else (values - band, values + band)
            axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    if mark is not None:
        axes.axvline(mark, color=GREY, linestyle=(0, (3, 2)), linewidth=1.2)
        late = mark > (at.min() + at.max()) / 2
        axes.annotate(f"{mark_label} {mark:g}", (mark, 0.5), xycoords=("data", "axes fraction"),
                      color=GREY,
                      ha="right" if late else "left", xytext=(-4 if late else 4, 0),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    if named:
        axes.set_xticks(
            at, [str(value) for value in x], rotation=30 if max(len(str(v)) for v in x) > 6 else 0
        )
    elif (
        len(at) > 2
        and at.min() > 0
        and at.max() >= 3 * at.min()
        and np.diff(at).max() >= 5 * np.diff(at).min() > 0
    ):
        _log_x(axes, at)  # grown by factors, not by steps
    elif all(float(v).is_integer() for v in at):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        if np.ptp(axes.get_ylim()) > 0.3:
            axes.set_ylim(-0.02, 1.02)
        _percent(axes.yaxis, whole=bool(np.ptp(axes.get_ylim()) > 0.1))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(axes)
    return figure


def pruning(
    pruned: Any, acc: Any, asr: Any, chosen: float | None = None, xlabel: str = "pruned channels"
) -> Figure:
    """Accuracy and attack success over `pruned: [P]` channels, mean and range of R seeds: `acc,
    asr: [R, P]`.
    """
    acc, asr = np.atleast_2d(acc), np.atleast_2d(asr)
    lines = {"accuracy": acc, "attack success": asr}
    return curves(
        np.asarray(pruned).tolist(),
        lines,
        None,
        xlabel,
        percent=True,
        mark=chosen,
        mark_label="stop at",
    )


def power_law(size: Any, seconds: Any) -> tuple[float, float]:
    """(b, a) of the line a·size^b through seconds over size, both logarithmic: b is 1 where twice
    the size takes twice as long.
    """
    slope, offset = np.polyfit(
        np.log(np.asarray(size, np.float64)), np.log(np.asarray(seconds, np.float64)), 1
    )
    return float(slope), float(np.exp(offset))


@styled
def runtime(cases: Mapping[str, tuple[Any, Any]], xlabel: str, ylabel: str = "seconds") -> Figure:
    """Seconds over size, both axes logarithmic, with exponents: `{name: (size: [X], seconds: [X] or
    [R, X])}`.
    """
    figure, axes = _axes(3.4)
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    sizes = []
    for i, (name, (size, seconds)) in enumerate(cases.items()):
        size, seconds = np.asarray(size, np.float64), np.atleast_2d(np.asarray(seconds, np.float64))
        middle, color = np.median(seconds, 0), COLORS[i % len(COLORS)]
        if len(size) > 1:
            slope, factor = power_law(size, middle)
            axes.plot(
                size,
                factor * size**slope,
                color=color,
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.2,
            )
            name = f"{name}, exponent {slope:.2f}"
        axes.plot(
            size, middle, marker=MARKERS[i % len(MARKERS)], color=color, linestyle="", label=name
        )
        axes.fill_between(
            size, seconds.min(0), seconds.max(0), color=color, alpha=0.18, linewidth=0
        )
        sizes.extend(size)
    _log_x(axes, sizes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""
    )
    _legend(axes)
    return figure


# --- Distributions ---


@styled
def histograms(
    samples: Mapping[str, Any],
    boundary: float | None = None,
    xlabel: str = "",
    boundary_label: str = "boundary",
    bins: int = 40,
) -> Figure:
    """Samples `{name: [n]}` as histograms over common bins, each a share of its own n, and a
    boundary.
    """
    figure, axes = _axes(2.9)
    arrays = {name: np.asarray(values, np.float64).ravel() for name, values in samples.items()}
    edges: Any = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins)
    for i, (name, values) in enumerate(arrays.items()):
        color = COLORS[i % len(COLORS)]
        weights = np.full(values.shape, 1 / max(len(values), 1))
        axes.hist(
            values,
            edges,
            weights=weights,
            histtype="stepfilled",
            color=color,
            alpha=0.3,
            label=name,
        )
        axes.hist(
            values,
            edges,
            weights=weights,
            histtype="step",
            color=color,
            linewidth=1.4,
            linestyle=DASHES[i % len(DASHES)],
        )
    if boundary is not None:
        axes.axvline(
            boundary,
            color="black",
            linestyle=(0, (3, 2)),
            linewidth=1.2,
            label=f"{boundary_label} {boundary:.3g}",
        )
    axes.set(xlabel=xlabel, ylabel="share")
    _percent(axes.yaxis, whole=False)
    _legend(axes)
    return figure


def entropies(
    clean: Any, trojan: Any, boundary: float | None = None, xlabel: str = "entropy of the blends"
) -> Figure:
    """STRIP's picture: the scores of clean and trojaned inputs, and the boundary under which an
    input is rejected.
    """
    return histograms({"clean": clean, "trojaned": trojan}, boundary, xlabel)


@styled
def boxes(
    groups: Mapping[str, Any], xlabel: str = "", line: float | None = None, line_label: str = ""
) -> Figure:
    """Box plots of `{name: [n]}` with every value where there are at most 60, and a line worth
    comparing with.
    """
    figure, axes = _axes(0.9 + 0.42 * len(groups))
    values = [np.asarray(v, np.float64).ravel() for v in groups.values()]
    axes.boxplot(values, orientation="horizontal", tick_labels=list(groups), widths=0.55,
                 showfliers=False, patch_artist=True,
                 boxprops={"facecolor": "#dbe9f3", "edgecolor": CLEAN},
                 medianprops={"color": TROJAN, "linewidth": 2},
                 whiskerprops={"color": CLEAN}, capprops={"color": CLEAN})  # fmt: skip
    for i, found in enumerate(values, 1):
        if len(found) <= 60:
            offsets = i + 0.16 * np.sin(np.arange(len(found)) * 2.4)
            axes.plot(found, offsets, ".", color="#1d2126", markersize=4, alpha=0.6)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(xlabel)
    if line is not None:
        axes.axvline(line, color="black", linestyle=(0, (3, 2)), linewidth=1.2)
        axes.annotate(line_label or f"{line:g}", (line, 1.0), xycoords=("data", "axes fraction"),
                      xytext=(0, 3),
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    return figure


# --- Labels, members, grids ---


@styled
def norms(
    l1: Any,
    index: Any = None,
    flagged: Any = None,
    target: int | None = None,
    names: Sequence[str] = (),
    what: str = "L1 of the mask",
) -> Figure:
    """Of Neural Cleanse the L1 norm of each label's reversed mask, of another judge `what`; the
    anomaly index above. `l1, index, flagged: [K]`.
    """
    l1 = np.asarray(l1, np.float64)
    count = len(l1)
    flagged = np.zeros(count, bool) if flagged is None else np.asarray(flagged, bool)
    figure, axes = _axes(3.0, WIDTH if count <= 16 else min(WIDTH + 0.16 * (count - 16), 9))
    at = np.arange(count)
    for which, color, hatch, label in (
        (~flagged, CLEAN, "", "not flagged"),
        (flagged, TROJAN, "////", "flagged"),
    ):
        if which.any():
            style = {
                "color": color,
                "hatch": hatch,
                "edgecolor": "white",
                "linewidth": 0,
                "width": 0.75,
            }
            axes.bar(at[which], l1[which], label=label, **style)
    median = float(np.median(l1))
    axes.axhline(
        median,
        color="black",
        linestyle=(0, (3, 2)),
        linewidth=1.2,
        zorder=1.5,
        label=f"median {median:.3g}",
    )
    for k, value in enumerate([] if index is None else np.asarray(index)):
        if count <= 16 or flagged[k]:
            box = {"facecolor": "white", "linewidth": 0, "pad": 0.5}
            axes.annotate(f"{value:.1f}", (k, l1[k]), xytext=(0, 3), textcoords="offset points",
                          ha="center",
                          fontsize=8, bbox=box)  # fmt: skip
    axes.set_xticks(at if count <= 16 else at[::5])
    if names:
        some = at if count <= 16 else np.flatnonzero(flagged) if flagged.any() else at[::5]
        axes.set_xticks(some, [class_name(int(k), names) for k in some], rotation=40, ha="right")
    if target is not None:
        axes.plot([target], [0], "^", color="black", markersize=8, clip_on=False,
                  label="true target",
                  transform=axes.get_xaxis_transform(), zorder=5)  # fmt: skip
    axes.grid(False, axis="x")
    above = "" if index is None else "(above the bar: anomaly index)"
    axes.set(xlabel=f"{'' if names else 'label'} {above}".strip(), ylabel=what)
    _legend(axes)
    return figure


@styled
def votes(clean: Any, trojan: Any, sees: Any = None) -> Figure:
    """Ensemble members: the share of clean and of stamped images for which each votes for the
    target, and who saw the trigger in training. `clean, trojan: [M]` shares, `sees: [M]` bool.
    """
    shares = np.stack([np.asarray(clean, np.float64), np.asarray(trojan, np.float64)])
    count = shares.shape[1]
    figure, axes = _axes(
        1.75 + (0.2 if sees is not None else 0), max(WIDTH, min(1.2 + 0.38 * count, 9))
    )
    picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if count <= 20:
        for i, k in np.ndindex(2, count):
            _value(axes, k, i, f"{100 * shares[i, k]:.0f}", float(shares[i, k]))
    ticks = np.arange(count) if count <= 20 else np.arange(4, count, 5)
    axes.set_xticks(ticks, [str(k + 1) for k in ticks])
    axes.set_yticks([0, 1], ["clean", "stamped"])
    axes.set_xlabel("member")
    axes.tick_params(length=0)
    if sees is not None:
        sees = np.asarray(sees, bool)
        for which, face in ((sees, "black"), (~sees, "white")):
            axes.plot(
                np.flatnonzero(which),
                np.full(which.sum(), 1.85),
                "o",
                mfc=face,
                mec="black",
                markersize=5,
            )
        axes.set_yticks([0, 1, 1.85], ["clean", "stamped", "saw trigger"])
        axes.set_ylim(2.15, -0.5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.02, aspect=8, label="votes for\nthe target")
    _percent(bar.ax.yaxis)
    return figure


def _value(axes: Axes, x: float, y: float, text: str, shade: float) -> None:
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color="black" if shade > 0.55 else "white",
    )


@styled
def heat_map(
    values: Any,
    x: Sequence[Any],
    y: Sequence[Any],
    xlabel: str = "",
    ylabel: str = "",
    label: str = "",
    percent: bool = False,
) -> Figure:
    """`values: [Y, X]` over two axes; NaN stays blank. The number stands in each cell where there
    is room.
    """
    values = np.asarray(values, np.float64)
    rows, columns = values.shape
    names = [_short(v) for v in x], [_short(v) for v in y]
    width = float(np.clip(1.7 + 0.075 * max(map(len, names[1])) + 0.5 * columns, 3.6, 9.5))
    height = np.clip(min(1.2 + 0.36 * rows, max(8.0, 1.2 + 0.28 * rows)), 1.8, 12)
    figure, axes = _axes(float(height), width)
    known = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if percent or not known.size else (known.min(), known.max())
    shown = np.clip(values, low, high)  # infinite values have the last colour
    picture = axes.imshow(shown, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    if columns <= 16:
        for i, j in np.ndindex(rows, columns):
            if not np.isnan(values[i, j]):
                shade = (shown[i, j] - low) / ((high - low) or 1)
                text = f"{100 * values[i, j]:.1f}" if percent else f"{values[i, j]:.3g}"
                _value(axes, j, i, text.replace("inf", "∞"), shade)
    step = (-(-columns // 24), -(-rows // 40))
    turned = (
        {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, names[0])) > 6
        else {}
    )
    axes.set_xticks(range(0, columns, step[0]), names[0][:: step[0]], **turned)
    axes.set_yticks(range(0, rows, step[1]), names[1][:: step[1]])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.02, label=label)
    if percent:
        _percent(bar.ax.yaxis)
    return figure


@styled
def validity(lines: Mapping[str, Sequence[tuple[float, float, bool]]], works: float) -> Figure:
    """Victims by name: `(asr_nt, that of the clean twin, whether it is invalid)` of each seed; the
    twin's may be NaN. `works`: from where on an attack does.
    """
    figure, axes = _axes(0.9 + 0.28 * len(lines), WIDTH)
    points = np.array([(i, *seed) for i, seeds in enumerate(lines.values()) for seed in seeds])
    at, asr, twin, bad = points.T
    bad = bad.astype(bool)
    axes.axvline(works, color=GREY, linestyle=(0, (3, 2)), linewidth=1)
    axes.plot(twin, at, "o", color=CLEAN, markerfacecolor="none", label="clean twin")
    axes.plot(asr[~bad], at[~bad], "s", color=TROJAN, label="victim")
    axes.plot(asr[bad], at[bad], "x", color="black", markersize=7, label="invalid victim")
    axes.set_yticks(range(len(lines)), [textwrap.shorten(name, 40) for name in lines])
    axes.set(xlim=(-0.03, 1.03), ylim=(len(lines) - 0.5, -0.5), xlabel="ASR nt")
    _percent(axes.xaxis)
    _legend(axes)
    return figure


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


# --- Analysis: where a net looks, how large its activations are, how many replicas are enough ---


def cams(pictures: Any, maps: Any, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Figure:
    """Grad-CAM laid over the images, each map on its own scale. `pictures: [R, C, H, W, 1 or 3]`,
    `maps: [R, C, H, W]`.
    """
    pictures, maps = np.asarray(pictures, np.float32), np.asarray(maps, np.float32)
    top = maps.max((2, 3), keepdims=True)
    heat = matplotlib.colormaps["inferno"](maps / np.where(top > 0, top, 1))[..., :3]
    return images(0.4 * pictures.mean(-1, keepdims=True) + 0.6 * heat, rows, columns, cell=1.0)


@styled
def activation_maps(means: Mapping[str, Any]) -> Figure:
    """Mean activation of every channel, a square each, on one scale: `{"clean": [C], "stamped":
    [C]}`.
    """
    values = {name: np.asarray(value, np.float64).ravel() for name, value in means.items()}
    count = max(map(len, values.values()))
    across = min(count, 32)
    down, top = -(-count // across), max(value.max() for value in values.values())
    figure = Figure((WIDTH, len(values) * (0.35 + 0.13 * down) + 0.5), layout="constrained")
    grid = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for axes, (name, value) in zip(grid, values.items()):
        filled = np.concatenate([value, np.full(down * across - len(value), np.nan)]).reshape(
            down, across
        )
        picture = axes.imshow(filled, cmap="cividis", vmin=0, vmax=top or 1)
        axes.set(xticks=[], yticks=[], title=name)
        axes.grid(False)
    figure.colorbar(
        picture,
        ax=list(grid),
        orientation="horizontal",
        aspect=40,
        label="mean activation of a channel",
    )
    return figure


@styled
def activation_norms(
    samples: Mapping[str, Any], auroc: Mapping[str, Any] | None = None, bins: int = 40
) -> Figure:
    """Histograms of ℓ1, ℓ2, ℓ∞: `{name: (l1: [N], l2: [N], linf: [N])}`; `auroc`: `{name: (l1, l2,
    linf)}` of some.
    """
    figure = Figure((WIDTH, 5.6), layout="constrained")
    for j, (axes, norm) in enumerate(zip(figure.subplots(3, 1), ("ℓ1", "ℓ2", "ℓ∞"))):
        edges: Any = np.histogram_bin_edges(
            np.concatenate([np.asarray(v[j]) for v in samples.values()]), bins
        )
        for i, (name, values) in enumerate(samples.items()):
            share = np.full(len(values[j]), 1 / len(values[j]))
            style: dict[str, Any] = {
                "color": COLORS[i % len(COLORS)],
                "linestyle": DASHES[i % len(DASHES)],
            }
            axes.hist(
                np.asarray(values[j]),
                edges,
                weights=share,
                histtype="step",
                label=name,
                linewidth=1.4,
                **style,
            )
        known = ", ".join(f"{name} {float(found[j]):.2f}" for name, found in (auroc or {}).items())
        axes.set(xlabel=f"{norm} norm" + (f" (AUROC: {known})" if known else ""), ylabel="share")
        _percent(axes.yaxis, whole=False)
    _legend(figure.axes[0])
    return figure


def replicas(sigma: Any, enough: float | None = None) -> Figure:
    """σ(N) of STRIP's entropies over the number N of replicas, from 2 up: `sigma: [n]`, and the N
    chosen.
    """
    sigma = np.asarray(sigma)[1:]
    line = {"clean inputs": sigma}
    return curves(
        np.arange(2, len(sigma) + 2),
        line,
        None,
        "replicas N",
        "σ of the entropy",
        False,
        enough,
        "N =",
    )
