"""One self-contained HTML page out of tables, pictures and notes: no script, nothing to download.

Names in it may come from a hostile checkpoint or folder, so every text is escaped, and control
characters are spelled out. Pictures are SVG shown through ``<img>``, where a browser runs no code.
The same input gives the same page.
"""

import html
import io
import math
import unicodedata
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE  # type: ignore[import-untyped]  # ships no annotations
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from unbackdoor.errors import printable
from unbackdoor.types import RawImages

INK, PAPER = "#010203", "#fdfefc"  # stand-ins, replaced by the reader's light or dark colours
# Okabe and Ito 2008, for all colour vision; the blue is lighter, to show on a dark page as well.
PALETTE = ("#2488cc", "#d55e00", "#009e73", "#cc79a7")
STRONG = ("#d55e00", INK, "#2488cc", "#009e73")
MUTED = ("#88aacc", "#c9b458", "#8fbfa0", "#c79ab0", "#a3a3a3")
LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))
STRONG_MARKERS, MUTED_MARKERS = "^DX*", "osv<"
MARKERS = "os^DvXP*<>"
WIDTH = 5.6  # inches; at a phone's width its 11-point letters are still 10 pixels high
LARGEST_SIDE = 112  # pixels; larger images are averaged down, to keep the page small
LARGEST_BOXED = 336  # the same for images with boxes, which are shown one by one

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "font.size": 11,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "unbackdoor",
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "xtick.color": INK,
    "ytick.color": INK,
}
FIGURE_CSS = (
    ":root{--ink:#1c2126;--paper:#fff}"
    "@media(prefers-color-scheme:dark){:root{--ink:#d9dee3;--paper:#14181c}}"
)
PAGE_CSS = """
:root{color-scheme:light dark;--ink:#1c2126;--soft:#5a636c;--line:#d5dade;--paper:#fff}
@media(prefers-color-scheme:dark){
:root{--ink:#d9dee3;--soft:#99a3ad;--line:#363d44;--paper:#14181c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1rem 4rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 1rem}
h2{margin:0;font-size:1.15rem;line-height:1.3}
summary h2{display:inline}
section{margin-top:2.75rem}
p{max-width:44rem;margin:.6rem 0;white-space:pre-line}
.lead{font-size:1.1rem}
.note,figcaption,.flags{max-width:44rem;color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.4rem 1.5rem .4rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top;overflow-wrap:break-word;max-width:min(38rem,60vw);font-weight:400}
tbody th{min-width:min(15rem,36vw)}
td:not(.number){min-width:7rem}
thead th{border-bottom:2px solid var(--soft);color:var(--soft);font-size:.9rem;
vertical-align:bottom}
.number{text-align:right;white-space:nowrap}
sup{display:inline-block;width:0;line-height:0;font-size:.7rem;color:var(--soft)}
.flags{margin:.4rem 0;padding-left:1.4rem}
.flags ::marker{content:"[" counter(list-item) "] "}
summary{cursor:pointer}
figure{margin:.8rem 0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
img{max-width:36rem;width:100%;height:auto}
@media print{
body{padding:0;max-width:none}
section{margin-top:1.5rem}
.scroll{overflow:visible}
figure,tr{break-inside:avoid}
h2{break-after:avoid}
details::details-content{display:block;content-visibility:visible}}
"""


GroupFeatures = Float[Tensor, "_n d"]  # groups differ in their number of rows


class Flagged(NamedTuple):
    """A number with a reservation, printed below its table: ``Flagged(3.1, "only two seeds")``."""

    value: float | int | None
    flag: str


Cell = str | float | int | None | Flagged


@dataclass(frozen=True)
class Table:
    """Rows under named columns; the first cell of a row names it.

    Columns of numbers are aligned to the right. None is shown as an en dash.

    Attributes:
        decimals: Places after the point of every float; None gives each four significant digits.
        lead: Stands above it: what was done.
        note: Stands below it: units, conditions, how many.
        folded: Show only the title until it is clicked; for long accounts.

    Raises:
        ValueError: If a row has more or fewer cells than there are columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    decimals: int | None = None
    lead: str = ""
    note: str = ""
    folded: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r} has {len(self.columns)} columns, but a row has "
                    f"{len(row)} cells: {row!r}"
                )


class Panel(NamedTuple):
    """One drawing, as SVG, and what it shows in words."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """Drawings side by side, one below the other on a phone."""

    title: str
    panels: Sequence[Panel]
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """A few paragraphs of plain text; line breaks are kept."""

    title: str
    text: str


def render_report(title: str, summary: str, parts: Sequence[Table | Picture | Note]) -> str:
    """Return a complete HTML page: the title, the result in a few sentences, then the parts.

    All texts are plain text, never markup.
    """
    body = "\n".join(_section(part) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{PAGE_CSS}</style>
</head>
<body>
<main>
<h1>{_escape(title)}</h1>
<p class="lead">{_escape(summary)}</p>
{body}
</main>
</body>
</html>
"""


def as_text(table: Table) -> list[str]:
    """Return a table of words and numbers as aligned lines for a terminal."""
    cells = [
        [
            _number(cell, table.decimals)
            if cell is None or isinstance(cell, float)
            else printable(f"{cell}")
            for cell in row
        ]
        for row in table.rows
    ]
    lines = [[printable(name) for name in table.columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    body = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    return ["", printable(table.title), *body]


def curves_picture(
    title: str,
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Picture:
    """Draw one line for every series over 1, 2, 3, ...; four series can be told apart.

    Raises:
        ValueError: If there is no series, or one without values.
    """
    if not series or any(len(values) == 0 for values in series.values()):
        raise ValueError(f"picture {title!r} needs at least one series, and values in each")
    with style.context(STYLE, after_reset=True):
        figure = Figure((WIDTH, 3.4))
        axes = figure.subplots()
        handles = []
        for index, values in enumerate(series.values()):
            marker = "o" if len(values) <= 30 else ""  # so that a single value can be seen
            color, line = PALETTE[index % len(PALETTE)], LINES[index % len(LINES)]
            steps = range(1, len(values) + 1)
            handles += axes.plot(
                steps, values, marker=marker, markersize=4, color=color, linestyle=line
            )
        axes.grid()
        axes.set_xlabel(_label(x_label))
        axes.set_ylabel(_label(y_label))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(figure, handles, list(series))
        svg = _svg(figure)
    ends = ", ".join(f"{name} from {v[0]:.4g} to {v[-1]:.4g}" for name, v in series.items())
    return Picture(title, (Panel(svg, f"{y_label} over {x_label}: {ends}"),), caption)


def bars_picture(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    *,
    x_label: str,
    decimals: int,
    caption: str = "",
) -> Picture:
    """Draw labelled bars: a group for every outer name, in it a bar for every inner name.

    Args:
        groups: As ``{"adversarial": {"before": 0.9, "after": 0.2}, "noise": {...}}``.

    Raises:
        ValueError: If there is no group, or the groups name different bars.
    """
    names = list(next(iter(groups.values()), {}))
    if not names or any(list(bars) != names for bars in groups.values()):
        raise ValueError(f"picture {title!r} needs groups that all hold the same bars")
    thickness = 0.8 / len(names)
    with style.context(STYLE, after_reset=True):
        figure = Figure((WIDTH, 1.2 + 0.3 * len(groups) * (len(names) + 0.5)))
        axes = figure.subplots()
        handles = []
        for index, name in enumerate(names):
            values = [bars[name] for bars in groups.values()]
            places = np.arange(len(groups)) + (index - (len(names) - 1) / 2) * thickness
            color = PALETTE[index % len(PALETTE)]
            drawn = axes.barh(places, values, thickness * 0.9, color=color)
            axes.bar_label(drawn, [_number(v, decimals) for v in values], padding=4)
            handles.append(drawn[0])
        axes.set_yticks(range(len(groups)), [_label(group) for group in groups])
        axes.tick_params("y", length=0)
        axes.grid(axis="x")
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(_label(x_label))
        _legend(figure, handles, names)
        svg = _svg(figure)
    values_alt = "; ".join(
        f"{group}: " + ", ".join(f"{name} {_number(bars[name], decimals)}" for name in names)
        for group, bars in groups.items()
    )
    return Picture(title, (Panel(svg, f"{x_label}. {values_alt}"),), caption)


def scatter_picture(
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    caption: str = "",
) -> Picture:
    """Draw points of named groups, a panel for every outer name; twenty groups can be told apart.

    Args:
        panels: As ``{"ASR": {"FT": [(90.0, 5.0), ...], ...}, "PA": {...}}``.

    Raises:
        ValueError: If a panel has no group, or a group no points.
    """
    drawn = []
    for name, groups in panels.items():
        if not groups or any(len(points) == 0 for points in groups.values()):
            raise ValueError(f"panel {name!r} of picture {title!r} needs groups with points")
        with style.context(STYLE, after_reset=True):
            figure = Figure((WIDTH, 4.2 + 0.25 * math.ceil(len(groups) / 3)))
            axes = figure.subplots()
            handles = []
            for index, points in enumerate(groups.values()):
                x, y = zip(*points, strict=True)
                handles += axes.plot(
                    x,
                    y,
                    linestyle="",
                    color=PALETTE[index % len(PALETTE)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=7,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.5,
                )
            axes.grid()
            axes.set(title=_label(name), xlabel=_label(x_label))
            _legend(figure, handles, list(groups))
            alt = f"{name}, over {x_label}. " + "; ".join(
                f"{group}: " + ", ".join(f"{x:.1f} {y:.1f}" for x, y in points)
                for group, points in groups.items()
            )
            drawn.append(Panel(_svg(figure), alt))
    return Picture(title, drawn, caption)


def images_picture(title: str, rows: Mapping[str, RawImages], *, caption: str = "") -> Picture:
    """Draw images in named rows, pixel by pixel; those above 112 pixels are averaged down.

    Args:
        rows: Images of one shape, grey or coloured; six a row fit well.

    Raises:
        ValueError: If there are no images, or their shapes differ or are not of 1 or 3 channels.
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or 0 in max(shapes) or max(shapes)[1] not in (1, 3):
        raise ValueError(
            f"picture {title!r} needs rows of one shape, grey or RGB, got {sorted(shapes)}"
        )
    strips = [_strip(images) for images in rows.values()]
    height = (WIDTH * strips[0].shape[0] / strips[0].shape[1] + 0.35) * len(strips)
    with style.context(STYLE, after_reset=True):
        figure = Figure((WIDTH, height))
        for axes, name, strip in zip(
            figure.subplots(len(strips), squeeze=False)[:, 0], rows, strips, strict=True
        ):
            axes.imshow(strip, interpolation="none")
            axes.set_title(_label(name), loc="left")
            axes.set_axis_off()
        svg = _svg(figure)
    count = max(shapes)[0]
    return Picture(title, (Panel(svg, f"{count} images each: {', '.join(rows)}"),), caption)


class BoxedImage(NamedTuple):
    """One image with boxes: left, top, right, bottom in pixels; the class and text of each."""

    image: RawImages
    boxes: Float[Tensor, "k 4"]
    labels: list[str]
    texts: list[str]


def boxes_picture(
    title: str, panels: Mapping[str, BoxedImage], *, classes: Sequence[str], caption: str = ""
) -> Picture:
    """Draw boxes in images, a panel for every name; a colour for every class.

    Args:
        panels: One image each, RGB; those above 336 pixels are averaged down.
        classes: Have their colours in this order, in every picture that is given the same.

    Raises:
        ValueError: If a panel holds another number of images than one, or of labels or texts than
            boxes, or a label that is no class.
    """
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(classes)}
    drawn = []
    for name, (image, boxes, labels, texts) in panels.items():
        fits = len(boxes) == len(labels) == len(texts) and colors.keys() >= set(labels)
        if image.shape[:2] != (1, 3) or not fits:
            raise ValueError(
                f"panel {name!r} of picture {title!r} needs one RGB image, and a class and a "
                "text for each box"
            )
        height, width = image.shape[2:]
        small = _shrunk(image, LARGEST_BOXED)
        with style.context(STYLE, after_reset=True):
            figure = Figure((WIDTH, WIDTH * min(height / width, 3) + 0.35))
            axes = figure.subplots()
            extent = (0, width, height, 0)
            axes.imshow(small[0].permute(1, 2, 0).numpy(), interpolation="none", extent=extent)
            for box, label, text in zip(boxes.tolist(), labels, texts, strict=True):
                (left, top, right, bottom), color = box, colors[label]
                across, down = right - left, bottom - top
                axes.add_patch(Rectangle((left, top), across, down, fill=False, edgecolor=color))
                axes.text(
                    left,
                    top,
                    _label(text),
                    color="white",
                    fontsize=7,
                    clip_on=True,
                    bbox={"facecolor": color, "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
                )
            axes.set(title=_label(name), xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
            svg = _svg(figure)
        counted = ", ".join(f"{each} {labels.count(each)}" for each in classes)
        drawn.append(Panel(svg, f"{name}: {len(boxes)} boxes. {counted}"))
    return Picture(title, drawn, caption)


def amplified_difference(clean: RawImages, changed: RawImages, *, gain: int) -> RawImages:
    """Return ``128 + gain * (changed - clean)``, clipped: grey where both are equal.

    Args:
        clean: Images of the shape of ``changed``.
        gain: Makes a change of ``127 / gain`` grey levels fully visible.
    """
    return (128 + gain * (changed.int() - clean.int())).clamp(0, 255).to(torch.uint8)


def tsne_picture(
    title: str,
    panels: Mapping[str, Mapping[str, GroupFeatures]],
    *,
    strong: Sequence[str],
    seed: int,
    limit: int = 1000,
    caption: str = "",
) -> Picture:
    """Draw features of named groups in the plane, a panel for every outer name.

    Features are scaled to unit length, so that neighbours are those of the cosine, as in the
    losses.

    Args:
        panels: As ``{"before": {"shirt": features, "triggered": features}, "after": {...}}``.
        strong: Groups to put forward, at most four; the others are drawn muted.
        seed: Draws the points; panels with groups of the same sizes show the same rows.
        limit: Most points in one panel; 1000 take some seconds.

    Raises:
        ValueError: If a panel holds fewer than five points or a name in ``strong`` is no group.

    Source:
        van der Maaten and Hinton 2008; perplexity 30, or a third of the points if that is less.
    """
    drawn = []
    for name, groups in panels.items():
        if unknown := set(strong) - set(groups):
            raise ValueError(f"{sorted(unknown)} are no groups of panel {name!r}: {list(groups)}")
        points = _embed(list(groups.values()), seed=seed, limit=limit)
        with style.context(STYLE, after_reset=True):
            figure = Figure((WIDTH, 5.2 + 0.25 * math.ceil(len(groups) / 3)))
            axes = figure.subplots()
            axes.set(title=_label(name), xticks=(), yticks=())
            axes.spines[:].set(visible=True, alpha=0.3)
            handles = _scatter(axes, list(groups), points, strong=strong)
            _legend(figure, handles, list(groups))
            alt = f"{name}: {len(points.places)} points of {', '.join(groups)}"
            drawn.append(Panel(_svg(figure), alt))
    return Picture(title, drawn, caption)


class _Points(NamedTuple):
    places: np.ndarray  # (n, 2)
    members: np.ndarray  # (n,), the number of each point's group


def _embed(groups: Sequence[GroupFeatures], *, seed: int, limit: int) -> _Points:
    features = F.normalize(torch.cat(list(groups)).detach().float().cpu())
    members = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:limit]
    if len(rows) < 5:
        raise ValueError(f"t-SNE needs at least 5 points, got {len(rows)}")
    tsne = TSNE(perplexity=min(30, len(rows) / 3), init="pca", random_state=seed)
    return _Points(tsne.fit_transform(features[rows].numpy()), members[rows].numpy())


def _scatter(
    axes: Axes, names: Sequence[str], points: _Points, *, strong: Sequence[str]
) -> list[Line2D]:
    """Draw the points and return one handle for every name."""
    handles = []
    muted = [name for name in names if name not in strong]
    for index, name in enumerate(names):
        x, y = points.places[points.members == index].T
        front = name in strong
        place = (strong if front else muted).index(name)
        colors, markers = (STRONG, STRONG_MARKERS) if front else (MUTED, MUTED_MARKERS)
        handles += axes.plot(
            x,
            y,
            linestyle="",
            color=colors[place % len(colors)],
            marker=markers[place % len(markers)],
            markersize=6 if front else 4,
            markeredgecolor=PAPER,
            markeredgewidth=0.5 if front else 0,
            zorder=3 if front else 2,
        )
    return handles


def _strip(images: RawImages) -> np.ndarray:
    """Return the images side by side as RGBA, transparent between them."""
    images = _shrunk(images, LARGEST_SIDE)
    n, _, height, width = images.shape
    gap = max(1, width // 16)
    strip = np.zeros((height, n * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(images.expand(n, 3, height, width).cpu().numpy()):
        left = index * (width + gap)
        strip[:, left : left + width, :3] = image.transpose(1, 2, 0)
        strip[:, left : left + width, 3] = 255
    return strip


def _shrunk(images: RawImages, largest: int) -> UInt8[Tensor, "n c _ _"]:
    """Return images averaged down by a whole number until no side is above ``largest``."""
    height, width = images.shape[2:]
    shrink = math.ceil(max(height, width) / largest)
    sides = max(1, height // shrink), max(1, width // shrink)
    return F.adaptive_avg_pool2d(images.float(), sides).round().to(torch.uint8)


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    labels = [_label(name) for name in names]
    letters = 62  # fit in a line; a handle takes the place of six
    columns = max(1, letters // (max(map(len, labels)) + 6))
    columns = min(columns, len(labels))
    lines = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + max(0, lines - 4) * 0.24)  # or no room is left
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, markerscale=1.3)


def _label(text: str) -> str:
    """Return the text cut to 40 letters: a longer one would squeeze the drawing to nothing."""
    text = _spelled_out(text)
    return text if len(text) <= 40 else text[:39] + "…"


def _svg(figure: Figure) -> str:
    """Return the figure as SVG whose ink and paper follow the reader's light or dark mode."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no date, no version
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("\n", " ")
    text = text.replace("<defs>", f"<style>{FIGURE_CSS}</style><defs>", 1)
    return text.replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")


def _section(part: Table | Picture | Note) -> str:
    heading = f"<h2>{_escape(part.title)}</h2>"
    match part:
        case Table(folded=True):
            summary = f"<summary>{heading} ({len(part.rows)} rows)</summary>"
            return f"<section><details>{summary}{_table(part)}</details></section>"
        case Table():
            return f"<section>{heading}{_table(part)}</section>"
        case Picture():
            return f"<section>{heading}{_figure(part)}</section>"
        case Note():
            return f"<section>{heading}<p>{_escape(part.text)}</p></section>"


def _figure(picture: Picture) -> str:
    images = ""
    for panel in picture.panels:
        data = urllib.parse.quote(panel.svg, safe=" /:;=,+()*!")
        images += f'<img alt="{_escape(panel.alt)}" src="data:image/svg+xml,{data}">'
    caption = f"<figcaption>{_escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><div class="panels">{images}</div>{caption}</figure>'


def _table(table: Table) -> str:
    flags = list(dict.fromkeys(c.flag for row in table.rows for c in row if isinstance(c, Flagged)))
    numeric = [
        not any(isinstance(row[column], str) for row in table.rows)
        for column in range(len(table.columns))
    ]
    classes = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_escape(name)}</th>'
        for name, kind in zip(table.columns, classes, strict=True)
    )
    body = ""
    for row in table.rows:
        texts = [_cell(cell, table.decimals, flags) for cell in row]
        cells = "".join(f"<td{k}>{t}</td>" for k, t in zip(classes[1:], texts[1:], strict=True))
        body += f'<tr><th scope="row"{classes[0]}>{texts[0]}</th>{cells}</tr>\n'
    items = "".join(f"<li>{_escape(flag)}</li>" for flag in flags)
    legend = f'<ol class="flags">{items}</ol>' if flags else ""
    lead, note = (
        f'<p class="note">{_escape(text)}</p>' if text else "" for text in (table.lead, table.note)
    )
    return (
        f'{lead}<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{legend}{note}"
    )


def _cell(cell: Cell, decimals: int | None, flags: Sequence[str]) -> str:
    match cell:
        case Flagged(value, flag):
            return f"{_number(value, decimals)}<sup>[{flags.index(flag) + 1}]</sup>"
        case str():
            return _escape(cell)
        case _:
            return _number(cell, decimals)


def _number(value: float | int | None, decimals: int | None) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)
    elif decimals is not None:
        text = f"{value:z.{decimals}f}"
    elif 10_000 <= abs(value) < 1e15:
        text = f"{value:,.0f}"
    else:
        text = f"{value:z.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _escape(text: str) -> str:
    return html.escape(_spelled_out(text))


def _spelled_out(text: str) -> str:
    """Spell out control characters, text-direction overrides and broken bytes of file names."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char)[0] == "C" and char != "\n"
        else char
        for char in text
    )
