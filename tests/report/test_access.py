"""The page for everyone: offline, at any width, from the keyboard, without scripts, on paper."""

from __future__ import annotations

import json

import pytest

LONG = {"command": "x" * 300, "model": "m" * 120, "machine": {"system": "y" * 200}}


def test_nothing_is_fetched_even_by_a_script(page, published) -> None:
    browser = page(published)
    assert browser.logged() == ([], {"file"})
    refused = browser.driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));"
        "document.body.append(Object.assign(new Image(), { src: 'https://example.invalid/a' }));"
        "setTimeout(() => done('nothing'), 2000)"
    )
    (told,), _ = browser.logged()
    assert refused == "img-src"
    assert "example.invalid" in told
    page(published)


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_never_scrolls_sideways(page, evaluation, published, width) -> None:
    long = {**json.loads(json.dumps(evaluation)), **LONG}
    long["agents"]["a" * 80] = long["agents"].pop("knorm")
    long["texts"][0]["tokens"][0] = "y" * 500
    browser = page(long, published, evaluation, width=width)
    for tab in browser.every("[role=tab]"):
        tab.click()
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        browser.settle()
        scrolled, inner = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert scrolled <= inner <= width


@pytest.mark.parametrize(("width", "both"), [(1200, True), (360, False)])
def test_the_second_agent_stands_beside_on_wide_screens_alone(page, made, width, both) -> None:
    browser = page(made(["a", "b"]), width=width)
    first, second = browser.every(".pane")
    assert second.is_displayed() == both
    assert not both or second.rect["x"] > first.rect["x"]


WANTED = [
    "a.skip",
    "summary.",
    "a.",
    "svg.",
    "select.agent",
    "select.shown",
    "rect.cell",
    "div.scroll",
    "select.text",
    "select.head",
    "div.words",
]
"""Elements in the order that the Tab key takes, by class."""


def test_everything_is_reached_by_tab_and_shows_its_focus(page, evaluation) -> None:
    browser = page(evaluation, evaluation)
    seen = []
    for _ in range(300):
        browser.press("TAB")
        name, ring = browser.run(
            "const one = document.activeElement, cell = one.matches('.cell');"
            "const ring = cell ? getComputedStyle(one.closest('svg').querySelector('.ring'))"
            "  : getComputedStyle(one);"
            "return [one.tagName.toLowerCase() + '.' + (one.className.baseVal ?? one.className),"
            "  cell ? ring.visibility === 'visible' : ring.outlineStyle !== 'none']"
        )
        if name == "body.":
            break
        assert ring, name
        seen.append(name)
    assert [name for name in dict.fromkeys(seen) if name in WANTED] == WANTED


def test_no_focus_is_hidden_under_the_bar_that_stays(page, evaluation) -> None:
    browser = page(evaluation)
    browser.run("document.querySelector('#result-1-tokens').scrollIntoView()")
    bar = browser.at(".bar").rect
    top = browser.run(
        "return document.querySelector('#result-1-tokens h2').getBoundingClientRect().top"
    )
    assert top >= bar["height"]


def test_every_control_has_a_name(page, evaluation, published) -> None:
    browser = page(evaluation, published)
    tree = browser.command("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "checkbox", "radio", "combobox", "slider", "tab", "gridcell", "link"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert {node["role"]["value"] for node in controls} == roles
    assert [node for node in controls if not node["name"]["value"].strip()] == []


def test_without_scripts_the_tables_of_every_result_remain(page, evaluation, published) -> None:
    browser = page(evaluation, published, scripts=False)
    for place in ("1-metrics", "1-compared", "1-perplexity"):
        assert browser.at(f"#result-{place} table").is_displayed()
    assert browser.at("#result-2-metrics [data-view=sink_free] table").is_displayed()
    assert not [one for one in browser.every(".scripted") if one.is_displayed()]


def test_on_paper_it_is_dark_on_light_without_the_controls(page, evaluation) -> None:
    browser = page(evaluation, evaluation, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.command("Emulation.setEmulatedMedia", {"media": "print", "features": [dark]})
    try:
        browser.settle()
        ground, ink = browser.run(
            "const style = getComputedStyle(document.documentElement);"
            "return [style.backgroundColor, style.color]"
        )
        shown = {css: browser.at(css).is_displayed() for css in (".bar", ".tabs", ".plot", ".map")}
    finally:
        browser.command("Emulation.setEmulatedMedia", {"media": ""})
    assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert shown == {".bar": False, ".tabs": False, ".plot": True, ".map": True}


CONTRAST = """
const luminance = (colour) => {
  const probe = document.body.appendChild(document.createElement('i'));
  probe.style.color = colour;
  const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((c) => {
    const s = c / 255;
    return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
  });
  probe.remove();
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const least = (colour) => Math.min(ratio(colour, 'var(--card)'), ratio(colour, 'var(--page)'));
const line = (i) => {
  const one = document.body.appendChild(document.createElement('i'));
  one.className = `c-${i}`;
  const colour = getComputedStyle(one).getPropertyValue('--c');
  one.remove();
  return colour;
};
return [
  ['--ink', '--quiet', '--accent', '--up', '--down'].map((name) => least(`var(${name})`)),
  [...Array(14).keys()].map((i) => least(line(i))),
];
"""
"""The contrast of each text colour, and of each agent's line, with the grounds behind them."""


@pytest.mark.parametrize("dark", [False, True])
def test_words_and_lines_stand_out_in_both_schemes(page, published, dark) -> None:
    browser = page(published, dark=dark)
    words, lines = browser.run(CONTRAST)
    assert min(words) >= 4.5
    assert len(lines) == 14
    assert min(lines) >= 3
