"""Two pictures of a result: the ratios, and where each case stands under the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .results import by_entry
from .sessions import Session, describe

INK, GRID, OURS, TARGET = "#1f2933", "#d9dee3", "#0b7285", "#e8590c"
PEER_COLORS = {"fused+grad_scale": "#4dabf7", "fused": "#1c7ed6", "foreach": "#868e96", "for-loop": "#ced4da"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.solid_capstyle": "butt",
}


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.10 * inch, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.40 * inch, subtitle, fontsize=9, va="top", color="#616e7c")


def plot_ratios(session: Session, path: Path, labels: Mapping[str, str] | None = None) -> None:
    """How many times longer each peer takes; one row per race, on a logarithmic scale from 1.

    Args:
        session: What was measured.
        path: The PNG file.
        labels: What to call the races, by their names, in place of these.
    """
    results = [result for result in session.results if result.peer != "one-thread"]
    races = {entry: list(by_peer.values()) for entry, by_peer in by_entry(results).items()}
    names = [(labels or {}).get(members[0].race, entry) for entry, members in races.items()]
    others = dict.fromkeys(result.peer for result in results if result.peer not in PEER_COLORS)
    colors = PEER_COLORS | dict(zip(others, matplotlib.colormaps["Dark2"].colors * len(others), strict=False))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 1.7 + 0.46 * len(races)))
        _plain_axes(axes)
        top = max([result.ratio for result in results] + [result.target_ratio or 1 for result in results])
        firsts = [first for result in results if (first := result.first_ratio) is not None]
        bottom = 0.9 * min([1.0, *(result.ratio for result in results), *firsts])
        for row, members in enumerate(races.values()):
            axes.plot([bottom, top * 1.5], [row, row], color=GRID, linewidth=0.7, zorder=0)
            for result in members:
                peer = result.peer
                color = colors[peer]
                runs = result.ratios
                if peer == "fused":
                    axes.plot([1, result.ratio], [row, row], color=color, linewidth=7, alpha=0.25)
                    axes.plot([min(runs), max(runs)], [row, row], color=color, linewidth=2)
                    first = result.first_ratio or math.nan
                    axes.scatter(first, row, s=46, color="white", edgecolor=color, label="fused, first step")
                axes.scatter(result.ratio, row, s=46, color=color, zorder=3, label=peer, edgecolor="white")
                if result.target_ratio is not None:
                    axes.scatter(
                        *(result.target_ratio, row), marker="|", s=190, linewidth=2.2, color=TARGET, zorder=4
                    )
            fused = next((r for r in members if r.peer == "fused"), members[0])
            axes.annotate(
                f"{fused.ratio:.2f}×",
                (fused.ratio, row),
                xytext=(0, 7.5),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=PEER_COLORS["fused"],
                fontweight="bold",
            )
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(bottom, top * 1.5)
        ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if bottom <= t <= top * 1.5]
        axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(races)), names)
        axes.set_ylim(len(races) - 0.4, -0.6)
        axes.set_xlabel("time of torch / time of FusedHygieneAdamW")
        handles, peers = axes.get_legend_handles_labels()
        unique = dict(zip(peers, handles, strict=True))
        unique["target"] = Line2D([], [], marker="|", ls="", ms=12, mew=2.2, color=TARGET)
        inch = 1 / figure.get_figheight()
        left = (0.3 + 0.075 * max(map(len, names))) / figure.get_figwidth()
        figure.subplots_adjust(left=left, right=0.98, top=1 - 1.2 * inch, bottom=0.55 * inch)
        figure.legend(
            unique.values(),
            unique,
            loc="upper right",
            bbox_to_anchor=(0.985, 1 - 0.6 * inch),
            ncols=min(len(unique), 6),
            frameon=False,
            fontsize=9,
            handletextpad=0.2,
            columnspacing=1.2,
        )
        _titles(figure, "Times faster than torch.optim.AdamW", describe(session))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]], gap: float) -> None:
    """Names of points: upright in a row under those near the roof, at least `gap` decades apart."""
    roof = max(y for _, y, _ in points)
    row = min(y for _, y, _ in points if y > roof / 10) / 12
    last = -math.inf
    for x, y, name in sorted(points):
        if y <= roof / 10:
            axes.annotate(name, (x, y), (-7, 5), textcoords="offset points", ha="right", fontsize=8.5)
            continue
        last = max(math.log10(x), last + gap)
        axes.plot([x, 10**last], [y, row], color=INK, linewidth=0.5, alpha=0.5, zorder=1)
        axes.annotate(
            name,
            (10**last, row),
            (0, -3),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="top",
            fontsize=8.5,
        )


def _bytes(value: float, _: object = None) -> str:
    """A power of ten as people say it."""
    power = round(math.log10(value)) // 3
    return f"{value / 1000**power:g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def plot_roofline(session: Session, path: Path) -> None:
    """Bytes per second against bytes per step: memory is the roof, the time of an empty step the slope."""
    # One point per case and backend: with the most threads, gradients where they are.
    chosen = {
        (r.case, r.backend): r
        for r in sorted(session.results, key=lambda r: r.threads or 0)
        if r.peer == "fused" and r.clip and r.gradients == "kept"
    }
    if not chosen:
        return
    against = list(chosen.values())
    copy = max(r.copy_gbps for r in against)
    stream = max(r.stream_gbps or 0.0 for r in against)
    roof = max(copy, stream)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 6.2))
        _plain_axes(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.grid(color=GRID, linewidth=0.6)
        least, most = min(r.bytes for r in against) / 3, max(r.bytes for r in against) * 6
        axes.set_xlim(least, most)
        for level, text in ((copy, "copy"), (stream, "4 reads, 3 writes")):
            if not level:  # it was not measured
                continue
            axes.axhline(level, color=INK, linewidth=1.2, linestyle="-" if text == "copy" else "--")
            axes.annotate(
                f"{text}: {level:,.1f} GB/s",
                (least, level),
                xytext=(4, 4 if level == roof else -12),
                textcoords="offset points",
                fontsize=9,
            )
        # The time that a step takes however little it moves: that of the smallest case.
        smallest = min(against, key=lambda r: r.bytes)
        for ms, color in ((smallest.ours_ms, OURS), (smallest.peer_ms, PEER_COLORS["fused"])):
            gbps_per_byte = 1e-6 / ms
            right = min(most, roof / gbps_per_byte)
            axes.plot(
                [least, right], [least * gbps_per_byte, right * gbps_per_byte], color=color, ls=":", lw=1
            )
            axes.annotate(
                f"{ms:.2g} ms",
                (least, least * gbps_per_byte),
                xytext=(4, 20),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
        for result in against:
            assert result.peer_bytes is not None
            ours = (result.bytes, result.gbps)
            peer = (result.peer_bytes, result.peer_bytes * 1e-6 / result.peer_ms)
            axes.plot(
                *zip(ours, peer, strict=True), color=PEER_COLORS["fused+grad_scale"], linewidth=1, zorder=1
            )
            axes.scatter(*ours, s=58, color=OURS, edgecolor="white", zorder=3)
            axes.scatter(*peer, s=40, color=PEER_COLORS["fused"], edgecolor="white", zorder=2)
        axes.set_ylim(top=2.5 * max(roof, *(r.gbps for r in against)))
        names: dict[str, tuple[float, float, str]] = {}
        for r in against:
            names.setdefault(r.case, (r.bytes, r.gbps, r.case))
        _label_points(axes, list(names.values()), gap=0.024 * math.log10(most / least))
        axes.xaxis.set_major_formatter(_bytes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("bytes that a step moves (clip included)")
        axes.set_ylabel("GB/s")
        axes.legend(
            handles=[
                Line2D([], [], marker="o", ls="", color=OURS, label="FusedHygieneAdamW"),
                Line2D([], [], marker="o", ls="", color=PEER_COLORS["fused"], label="clip + fused AdamW"),
                Line2D([], [], ls=":", color=INK, label="time of the smallest step"),
            ],
            loc="lower right",
            frameon=False,
        )
        figure.subplots_adjust(left=0.08, right=0.98, top=0.88, bottom=0.09)
        _titles(figure, "Clip + step under the roofline", describe(session))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)
