"""The page stands alone, escapes what it is given, and shows each figure in two inks."""

import base64
import re
from html.parser import HTMLParser

from matplotlib.figure import Figure

from parscale import page

VOID = {"meta", "img", "source", "br"}


class Checker(HTMLParser):
    """Collects tags and text, and whether every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)


def draw() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 5])
    return figure


def read(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def test_a_page_is_whole_and_stands_alone():
    blocks = [page.text("a < b & c", "note"), page.table(["", "<x>"], [["row", 1.5]])]
    text = page.page("A <title>", "below", [("Part", [*blocks, page.figure(draw, "two")])])
    found = read(text)
    assert "a < b & c" in found.words
    assert "<x>" in found.words
    assert "1.5" in found.words
    assert found.words.count("A <title>") == 2  # in the head and as the heading
    for _, attributes in found.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "@import" not in text
    assert "url(" not in page.CSS


def test_a_figure_has_dark_and_light_ink():
    found = read(page.figure(draw, "two"))
    sources = {tag: attributes for tag, attributes in found.tags if tag in ("img", "source")}
    assert sources["source"]["media"] == "(prefers-color-scheme: dark)"
    urls = sources["img"]["src"], sources["source"]["srcset"]
    light, dark = (base64.b64decode(url.split(",")[1]).decode() for url in urls)
    for own, other, mode in ((light, dark, "light"), (dark, light, "dark")):
        assert page.INK[mode] in own
        assert page.INK[mode] not in other
        assert re.search(r"<svg[^>]*>", own)
    assert page.figure(draw, "two") == page.figure(draw, "two")
