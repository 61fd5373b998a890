import base64
import io
import re
import urllib.parse
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import image as mpl_image

from unbackdoor.report import (
    BoxedImage,
    Flagged,
    Note,
    Panel,
    Picture,
    Table,
    amplified_difference,
    as_text,
    bars_picture,
    boxes_picture,
    curves_picture,
    images_picture,
    render_report,
    tsne_picture,
)

HOSTILE = "\"'></td></title></style><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


class Elements(HTMLParser):
    """Collects the elements, attributes and texts that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser


def cells_of(table: Table) -> list[str]:
    """Return the texts of the table's body."""
    body = render_report("t", "s", [table]).split("<tbody>")[1].split("</tbody>")[0]
    return re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", body)


def clusters(groups: int, *, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(groups, 8, generator=generator)
    noise = torch.randn(groups, size, 8, generator=generator)
    return {f"group {i}": centres[i] + 0.1 * noise[i] for i in range(groups)}


def every_part(text: str) -> list[Table | Picture | Note]:
    """Return one part of every kind, with ``text`` wherever a text can stand."""
    images = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    groups = dict(zip((text, "other"), clusters(2, size=10).values(), strict=True))
    labels = {"x_label": text, "caption": text}
    return [
        Table(text, (text, "n"), [(text, Flagged(1.0, text))], note=text),
        Table(text, (text,), [(text,)], folded=True),
        Note(text, text),
        curves_picture(text, {text: [2.0, 1.0]}, y_label=text, **labels),
        bars_picture(text, {text: {text: 1.0}}, decimals=1, **labels),
        images_picture(text, {text: images.to(torch.uint8)}, caption=text),
        boxes_picture(
            text,
            {text: BoxedImage(images[:1].to(torch.uint8), torch.ones(1, 4), [text], [text])},
            classes=[text],
            caption=text,
        ),
        tsne_picture(text, {text: groups}, strong=[text], seed=0, caption=text),
    ]


def test_hostile_text_adds_no_element_and_no_attribute() -> None:
    harmless = parse(render_report("name", "name", every_part("name")))
    hostile = parse(render_report(HOSTILE, HOSTILE, every_part(HOSTILE)))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    assert [list(a) for _, a in hostile.elements] == [list(a) for _, a in harmless.elements]
    assert hostile.texts.count(HOSTILE) == harmless.texts.count("name")


def test_hostile_text_adds_no_element_to_a_drawing() -> None:
    for part in every_part(HOSTILE):
        if isinstance(part, Picture):
            tags = {tag for tag, _ in parse(part.panels[0].svg).elements}
            assert tags <= {"svg", "style", "defs", "g", "path", "use", "clippath", "rect", "image"}


def test_page_runs_nothing_and_loads_nothing() -> None:
    elements = parse(render_report("t", "s", every_part("name"))).elements
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in elements
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements}
    sources = [
        a[name] or "" for _, a in elements for name in ("src", "href", "srcset") if name in a
    ]
    assert len(sources) == 5
    assert all(source.startswith("data:image/svg+xml,") for source in sources)
    drawings = " ".join(urllib.parse.unquote(source) for source in sources)
    assert not re.findall(r'href="(?!#|data:)|url\((?!#)|@import', drawings)


def test_control_characters_and_broken_file_names_are_spelled_out() -> None:
    page = render_report("a\x00b", "left\u202eright", [Note("n", "\udcff.png\nnext line")])
    assert "a\\x00b" in page
    assert "left\\u202eright" in page
    assert "\\udcff.png\nnext line" in page
    assert page.encode("utf-8")
    svg = curves_picture("t", {"\x00\udcff": [1.0]}, x_label="x", y_label="y").panels[0].svg
    assert "\\x00\\udcff" in svg
    assert "\x00" not in svg


def test_dollar_signs_in_names_are_not_read_as_formulas() -> None:
    svg = curves_picture("t", {"$\\frac$": [1.0]}, x_label="x", y_label="y").panels[0].svg
    assert "<!-- $\\frac$ -->" in svg


def test_same_input_gives_the_same_page() -> None:
    first, second = (render_report("t", "s", every_part("name")) for _ in range(2))
    assert first == second


def test_drawing_leaves_global_state_alone() -> None:
    settings, numpy_state, torch_state = (
        dict(mpl.rcParams),
        np.random.get_state(legacy=False),  # noqa: NPY002 the global state is what is tested
        torch.get_rng_state(),
    )
    every_part("name")
    assert dict(mpl.rcParams) == settings
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert np.array_equal(after["state"]["key"], numpy_state["state"]["key"])
    assert after["state"]["pos"] == numpy_state["state"]["pos"]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_own_matplotlib_settings_do_not_change_a_drawing() -> None:
    def draw() -> str:
        return curves_picture("t", {"a": [2.0, 1.0]}, x_label="x", y_label="y").panels[0].svg

    usual = draw()
    with mpl.rc_context({"lines.linewidth": 9, "savefig.transparent": True}):
        assert draw() == usual


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (None, 1, "\N{EN DASH}"),
        (87.449, 1, "87.4"),
        (100.0, 1, "100.0"),
        (-0.04, 1, "0.0"),
        (-2.13, 3, "\N{MINUS SIGN}2.130"),
        (8 / 255, None, "0.03137"),
        (5e-4, None, "0.0005"),
        (1234567.8, None, "1,234,568"),
        (20, 1, "20"),
        (2026, None, "2026"),
        (147456, None, "147,456"),
        (True, None, "yes"),
        (float("nan"), 1, "nan"),
    ],
)
def test_numbers_have_sensible_digits(value: float | None, decimals: int | None, text: str) -> None:
    assert cells_of(Table("t", ("name", "x"), [("row", value)], decimals)) == ["row", text]


def test_columns_of_numbers_are_aligned_to_the_right_and_others_are_not() -> None:
    table = Table("t", ("name", "number", "mixed"), [("a", 1.5, 3), ("b", None, "three")])
    elements = parse(render_report("t", "s", [table])).elements
    kinds = [a.get("class") for tag, a in elements if tag in ("th", "td")]
    assert kinds == [None, "number", None] * 3


def test_flags_are_listed_once_below_the_table() -> None:
    rows = [("a", Flagged(1.0, "few seeds")), ("b", Flagged(None, "weak victim"))]
    table = Table("t", ("name", "x"), [*rows, ("c", Flagged(2.0, "few seeds"))], decimals=1)
    assert cells_of(table)[1::2] == [
        "1.0<sup>[1]</sup>",
        "\N{EN DASH}<sup>[2]</sup>",
        "2.0<sup>[1]</sup>",
    ]
    page = render_report("t", "s", [table])
    assert '<ol class="flags"><li>few seeds</li><li>weak victim</li></ol>' in page


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"table 'scores' has 2 columns, but a row has 1 cells"):
        Table("scores", ("name", "x"), [("a",)])


def pixels_of(picture: Picture) -> list[np.ndarray]:
    """Return the pictures inside the drawing, uint8 RGBA, in no certain orientation."""
    found = re.findall(r'data:image/png;base64,\s*([^"]+)"', picture.panels[0].svg)
    arrays = (mpl_image.imread(io.BytesIO(base64.b64decode(text))) for text in found)
    return [(255 * array).round().astype(np.uint8) for array in arrays]


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_drawn_pixel_by_pixel(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, channels, 28, 28), generator=generator).to(torch.uint8)
    clean, inverted = pixels_of(images_picture("t", {"clean": images, "inverted": 255 - images}))
    assert clean.shape == (28, 28 + 1 + 28, 4)
    top, bottom = clean[0, 0, :3].tolist(), images[0, :, 0, 0].expand(3).tolist()
    clean, inverted = (clean, inverted) if top == bottom else (clean[::-1], inverted[::-1])
    for left, image in ((0, images[0]), (29, images[1])):
        expected = image.expand(3, 28, 28).permute(1, 2, 0).numpy()
        assert np.array_equal(clean[:, left : left + 28, :3], expected)
        assert np.array_equal(inverted[:, left : left + 28, :3], 255 - expected)
    assert (clean[:, 28, 3] == 0).all()


def test_large_images_are_averaged_down_to_112_pixels() -> None:
    images = torch.zeros(1, 1, 224, 224, dtype=torch.uint8)
    images[:, :, ::2, ::2] = 200
    (drawn,) = pixels_of(images_picture("t", {"checks": images}))
    assert drawn.shape == (112, 112, 4)
    assert (drawn[:, :, :3] == 50).all()


def test_images_picture_refuses_rows_of_different_shapes() -> None:
    rows = {"a": torch.zeros(2, 3, 8, 8).byte(), "b": torch.zeros(1, 3, 8, 8).byte()}
    with pytest.raises(ValueError, match=r"rows of one shape, grey or RGB, got \[\(1, 3, 8, 8\)"):
        images_picture("t", rows)
    with pytest.raises(ValueError, match=r"rows of one shape, grey or RGB, got \[\]"):
        images_picture("t", {})


def test_boxes_are_drawn_where_they_are() -> None:
    black = torch.zeros(1, 3, 600, 800).byte()
    corners = [[100.0, 150.0, 500.0, 450.0], [600.0, 0.0, 800.0, 300.0]]
    panel = BoxedImage(black, torch.tensor(corners), ["red", "green"], ["red 0.9", "green 0.8"])
    drawn = boxes_picture("t", {"found": panel}, classes=["green", "red", "blue"])
    (pixels,) = pixels_of(drawn)
    assert pixels.shape[:2] == (200, 266)  # a third
    assert drawn.panels[0].alt == "found: 2 boxes. green 1, red 1, blue 0"
    outlines = re.findall(r'd="M ([\d. ML]+) z[^>]*? style="fill: none', drawn.panels[0].svg)
    extents = []
    for outline in outlines:
        numbers = np.array([float(word) for word in re.findall(r"[\d.]+", outline)]).reshape(-1, 2)
        extents.append([*numbers.min(0), *numbers.max(0)])
    first, second = (np.array(extent) for extent in extents)
    scale = (first[2] - first[0]) / 400
    assert (first[3] - first[1]) / 300 == pytest.approx(scale, rel=1e-3)
    assert second - first == pytest.approx(scale * np.array([500, -150, 300, -150]), abs=0.1)


def test_a_class_has_its_colour_in_every_picture() -> None:
    black, box = torch.zeros(1, 3, 8, 8).byte(), torch.tensor([[1.0, 1.0, 5.0, 5.0]])
    classes, colors = ("traffic sign", "traffic light", ""), []
    for label, others in zip(
        (*classes, "traffic sign"), ([], [], [], ["traffic light"]), strict=True
    ):
        labels = [label, *others]
        panel = BoxedImage(black, box.repeat(len(labels), 1), labels, ["0.9"] * len(labels))
        (drawn,) = boxes_picture("t", {"found": panel}, classes=classes).panels
        colors.append(re.findall(r"style=\"fill: none; stroke: (#\w+)", drawn.svg))
    assert colors[3] == [*colors[0], *colors[1]]
    assert len({color for (color,) in colors[:3]}) == 3


def test_boxes_picture_refuses_a_box_without_a_class_or_text() -> None:
    image = torch.zeros(1, 3, 8, 8).byte()
    for panel in (
        BoxedImage(image, torch.zeros(1, 4), [], ["a"]),
        BoxedImage(image, torch.zeros(1, 4), ["a"], []),
        BoxedImage(image, torch.zeros(1, 4), ["b"], ["b"]),
        BoxedImage(image.expand(2, 3, 8, 8), torch.zeros(0, 4), [], []),
    ):
        with pytest.raises(ValueError, match="panel 'found' of picture 't' needs one RGB image"):
            boxes_picture("t", {"found": panel}, classes=["a"])


def test_a_table_as_text_steers_no_terminal_and_shows_what_is_missing() -> None:
    lines = as_text(Table("t\x1b[2J", ("n", "AP"), [("dog\x1b]0;x\x07", None), ("cat", 1.5)]))
    assert lines == ["", "t?[2J", "n           AP", "dog?]0;x?    \N{EN DASH}", "cat        1.5"]


def test_amplified_difference_is_grey_without_change_and_clipped() -> None:
    clean = torch.tensor([10, 10, 10, 200], dtype=torch.uint8).view(1, 1, 2, 2)
    changed = torch.tensor([10, 15, 200, 10], dtype=torch.uint8).view(1, 1, 2, 2)
    difference = amplified_difference(clean, changed, gain=4)
    assert difference.flatten().tolist() == [128, 148, 255, 0]


def test_drawings_follow_dark_mode() -> None:
    svg = curves_picture("t", {"a": [2.0, 1.0]}, x_label="x", y_label="y").panels[0].svg
    assert "@media(prefers-color-scheme:dark){" in svg
    assert "stroke: var(--ink)" in svg
    assert "fill: var(--paper)" in svg


def test_curves_say_their_ends_in_words() -> None:
    picture = curves_picture("t", {"pull": [5.0, 4.0, 3.25]}, x_label="epoch", y_label="loss")
    assert picture.panels[0].alt == "loss over epoch: pull from 5 to 3.25"


def test_curves_picture_refuses_a_series_without_values() -> None:
    with pytest.raises(ValueError, match="'loss' needs at least one series, and values in each"):
        curves_picture("loss", {"pull": []}, x_label="epoch", y_label="loss")


def test_bars_have_lengths_in_proportion_to_their_values() -> None:
    groups = {"adversarial": {"before": 0.8, "after": 0.2}, "noise": {"before": 0.4, "after": 0.1}}
    panel = bars_picture("t", groups, x_label="cosine", decimals=2).panels[0]
    expected = "cosine. adversarial: before 0.80, after 0.20; noise: before 0.40, after 0.10"
    assert panel.alt == expected
    corners = re.findall(r"M ([\d.]+) [\d.]+ +L ([\d.]+) [\d.]+ +L \2 [\d.]+ +L \1 ", panel.svg)
    lengths = sorted(float(right) - float(left) for left, right in corners[-8:])
    assert any(
        np.allclose(np.array(lengths[i : i + 4]) / lengths[i], [1, 2, 4, 8], rtol=1e-3)
        for i in range(len(lengths) - 3)
    )


def test_bars_picture_refuses_groups_with_different_bars() -> None:
    with pytest.raises(ValueError, match="needs groups that all hold the same bars"):
        bars_picture("t", {"a": {"x": 1.0}, "b": {"y": 1.0}}, x_label="x", decimals=1)


def places_of(panel: Panel) -> dict[str, np.ndarray]:
    """Return the drawn places of every marker's colour, without those in the legend."""
    drawing = panel.svg.split('id="legend_1"')[0]
    uses = re.findall(r'<use [^>]*#m[^>]* x="([\d.]+)" y="([\d.]+)" style="fill: ([^;"]+)', drawing)
    colors = {color for _, _, color in uses}
    return {c: np.array([(float(x), float(y)) for x, y, own in uses if own == c]) for c in colors}


def test_tsne_keeps_clusters_apart() -> None:
    groups = clusters(3, size=20)
    picture = tsne_picture("t", {"before": groups}, strong=["group 1"], seed=0)
    places = places_of(picture.panels[0])
    assert sorted(len(own) for own in places.values()) == [20, 20, 20]
    for color, own in places.items():
        radius = np.linalg.norm(own - own.mean(0), axis=1).max()
        others = np.concatenate([other for c, other in places.items() if c != color])
        assert np.linalg.norm(others - own.mean(0), axis=1).min() > radius


def test_tsne_draws_at_most_the_limit_and_the_same_rows_in_every_panel() -> None:
    groups = clusters(2, size=30)
    panels = {"before": groups, "after": dict(groups)}
    before, after = tsne_picture("t", panels, strong=[], seed=0, limit=20).panels
    assert sum(len(own) for own in places_of(before).values()) == 20
    assert places_of(before).keys() == places_of(after).keys()
    for color, own in places_of(before).items():
        assert np.array_equal(own, places_of(after)[color])
    assert before.alt == "before: 20 points of group 0, group 1"


def test_tsne_refuses_unknown_strong_groups_and_too_few_points() -> None:
    groups = clusters(2, size=2)
    with pytest.raises(ValueError, match=r"\['trigger'\] are no groups of panel 'before'"):
        tsne_picture("t", {"before": groups}, strong=["trigger"], seed=0)
    with pytest.raises(ValueError, match="t-SNE needs at least 5 points, got 4"):
        tsne_picture("t", {"before": groups}, strong=[], seed=0)


@pytest.mark.slow
def test_tsne_of_1000_points_stays_under_200_kib() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = {f"group {i}": torch.rand(100, 2, generator=generator) for i in range(10)}
    picture = tsne_picture("t", {"before": groups}, strong=["group 0"], seed=0)
    assert len(render_report("t", "s", [picture])) < 200 * 1024
