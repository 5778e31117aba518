"""The page in headless Chromium: what its parts do, by mouse and by keyboard."""

from __future__ import annotations

import pytest


def test_tabs_show_one_result_and_follow_the_arrow_keys(page, evaluation, published) -> None:
    browser = page(evaluation, published)

    def shown() -> list[bool]:
        return [one.is_displayed() for one in browser.every(".result")]

    tabs = browser.every("[role=tab]")
    assert shown() == [True, False]
    browser.press("ARROW_RIGHT", on="[role=tab]")
    assert shown() == [False, True]
    assert browser.focused("aria-selected") == "true"
    browser.settle()
    assert browser.at("#result-2 .plot svg .curve").is_displayed()  # drawn once it has a width
    browser.press("ARROW_RIGHT")
    assert shown() == [True, False]
    tabs[1].click()
    assert shown() == [False, True]
    assert [tab.get_attribute("tabindex") for tab in tabs] == ["-1", "0"]


def test_columns_sort_both_ways_and_say_so(page, evaluation) -> None:
    browser = page(evaluation)
    table = "#result-1-metrics [data-view=full] table"
    normalized_score = f"{table} thead th:nth-child(3)"

    def order() -> tuple[list[str], str | None]:
        return browser.texts(f"{table} tbody th"), browser.at(normalized_score).get_attribute(
            "aria-sort"
        )

    normalized_scores = {
        name: a["full"]["normalized_score"]["mean"] for name, a in evaluation["agents"].items()
    }
    down = sorted(normalized_scores, key=lambda name: -normalized_scores[name])
    browser.at(f"{normalized_score} button").click()
    assert order() == (down, "descending")
    browser.press("ENTER", on=f"{normalized_score} button")
    assert order() == (down[::-1], "ascending")
    browser.press("SPACE", on=f"{table} thead th button")
    assert order() == (sorted(normalized_scores), None)


def test_the_full_cache_stays_on_top_of_a_sorted_table(page, evaluation) -> None:
    browser = page(evaluation)
    table = "#result-1-perplexity .card:first-child table"
    browser.at(f"{table} thead th:nth-child(2) button").click()
    cut = evaluation["perplexity"]["agents"]
    down = sorted(cut, key=lambda name: -cut[name]["0.5"]["mean"])
    assert browser.texts(f"{table} tbody th") == ["full cache", *down]


@pytest.mark.parametrize("view", ["full", "sink_free"])
def test_the_switch_changes_drawings_and_tables_alike(page, evaluation, view) -> None:
    browser = page(evaluation)
    for one in ("sink_free", view):
        browser.at(f".views input[value={one}]").click()
    agent = evaluation["agents"]["kvp"]
    mean = agent["curve"][view]["mean"][evaluation["budgets"].index(1 / 8)]
    normalized_score = f"kvp {agent['per_head'][view][0]:.3f}".replace("-", "\N{MINUS SIGN}")
    assert browser.texts(".legend b")[0] == f"{mean:.3f}"
    assert normalized_score in browser.at(".heat .cell").get_attribute("aria-label")
    for other in ("full", "sink_free"):
        tables = browser.every(f"#result-1-metrics [data-view={other}]")
        assert [table.is_displayed() for table in tables] == [other == view]


def test_the_legend_switches_agents_off_and_on(page, evaluation) -> None:
    browser = page(evaluation)

    def drawn() -> set[str]:
        return {group.get_attribute("data-agent") for group in browser.every(".plot .curve")}

    agents = set(evaluation["agents"])
    first = browser.texts(".entries label:nth-child(1) span")[0]
    assert drawn() == agents
    browser.press("SPACE", on=".entries label:nth-child(1) input")
    assert drawn() == agents - {first}
    browser.at(".legend-head button").click()
    assert drawn() == agents
    browser.at(".legend-head button").click()
    assert drawn() == {"kvp", "oracle"}


def test_of_many_heuristics_a_few_are_drawn_until_all_are_asked_for(page, evaluation) -> None:
    agents = evaluation["agents"]
    for i in range(8):
        agents[f"copy {i}"] = agents["knorm"]
    browser = page(evaluation)
    assert len(browser.every(".plot .curve")) == 7  # kvp, the oracle and five heuristics
    browser.at(".legend-head button").click()
    curves = browser.every(".plot .curve")
    assert len(curves) == len(agents) == 12
    looks = {
        (
            curve.get_attribute("class"),
            curve.find_elements("css selector", "path")[1].get_attribute("stroke-dasharray"),
        )
        for curve in curves
    }
    assert len(looks) == 12


def test_arrow_keys_move_the_budget_that_the_legend_tells(page, evaluation) -> None:
    browser = page(evaluation)
    chart, budgets = browser.at(".plot svg"), evaluation["budgets"]
    mean = evaluation["agents"]["oracle"]["curve"]["full"]["mean"]
    last = len(budgets) - 1
    for key, index in (("HOME", 0), ("ARROW_RIGHT", 1), ("END", last), ("ARROW_LEFT", last - 1)):
        browser.press(key, on=".plot svg")
        assert chart.get_attribute("aria-valuenow") == str(index)
        assert f"oracle {mean[index]:.3f}" in chart.get_attribute("aria-valuetext")
    assert browser.texts(".legend output") == ["31/32"]


def test_the_heat_map_tells_each_head_by_mouse_and_keys(page, evaluation) -> None:
    browser = page(evaluation)
    normalized_scores = {name: a["per_head"]["full"] for name, a in evaluation["agents"].items()}
    browser.press("d", "TAB", on=".heat .shown")  # the difference to the best heuristic
    assert browser.focused("aria-label").startswith("layer 0, head 0, kvp")
    browser.press("ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT")
    rival = max(("random", "knorm"), key=lambda name: normalized_scores[name][3])
    words = [
        "layer 1, head 1",
        f"kvp {normalized_scores['kvp'][3]:.3f}",
        f"best heuristic {rival} {normalized_scores[rival][3]:.3f}",
        f"difference {normalized_scores['kvp'][3] - normalized_scores[rival][3]:+.3f}",
    ]
    tip = browser.at(".tip")
    assert tip.is_displayed()
    assert tip.text == "\n".join(words).replace("-", "\N{MINUS SIGN}")
    browser.press("ESCAPE")
    assert not tip.is_displayed()
    box = browser.run("return document.querySelector('.cell[data-index=\"2\"]').getBBox()")
    assert box["width"] >= 14
    moved = {"type": "mouseMoved", **center(browser, '.cell[data-index="2"]')}
    browser.command("Input.dispatchMouseEvent", moved)
    assert tip.text.startswith("layer 1, head 0")


def center(browser, css: str) -> dict[str, float]:
    """Where the middle of an element is in the window."""
    browser.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", css)
    return browser.run(
        "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return { x: box.x + box.width / 2, y: box.y + box.height / 2 }",
        css,
    )


@pytest.mark.parametrize("width", [1200, 360])
def test_a_model_with_few_recorded_heads_has_only_their_cells(page, made, width) -> None:
    agents = {"a": {"kind": "learned", "per_head": {"full": [0.5, 0.75, 1.0]}}}
    result = made(["x"], heads=[[5, 0], [11, 0], [17, 0]], agents=agents, model_layers=18)
    del result["texts"]
    browser = page(result, width=width)
    cells = browser.every(".cell")
    assert [cell.get_attribute("aria-label") for cell in cells] == [
        "layer 5, head 0, a 0.500",
        "layer 11, head 0, a 0.750",
        "layer 17, head 0, a 1.000",
    ]
    assert len({cell.get_attribute("fill") for cell in cells}) == 3
    assert not browser.at(".heat .shown").is_displayed()  # there is no heuristic


def classes(browser, pane: int = 0) -> list[set[str]]:
    """The classes of a pane's tokens."""
    names = browser.run(
        "const pane = document.querySelectorAll('.words')[arguments[0]];"
        "return [...pane.querySelectorAll('span')].map((one) => one.className)",
        pane,
    )
    return [set(name.split()) for name in names]


def test_the_slider_evicts_what_the_ranks_say(page, made) -> None:
    browser = page(made([f"w{i} " for i in range(64)]))  # agents: first and last
    slider = ".tokens input"
    browser.press("HOME", on=slider)
    for steps, kept in ((0, 1), (4, 2), (12, 16), (8, 64)):
        browser.press(*["ARROW_RIGHT"] * steps, on=slider)
        gone = [i for i, names in enumerate(classes(browser)) if "gone" in names]
        lost = [i for i, names in enumerate(classes(browser, 1)) if "lost" in names]
        assert gone == list(range(kept, 64))
        assert lost == list(range(64 - kept))
        assert f"{kept} of 64 tokens" in browser.at(slider).get_attribute("aria-valuetext")


def test_all_heads_together_show_the_share_that_keeps_a_token(page, evaluation) -> None:
    browser = page(evaluation)
    browser.press("END", on=".tokens input")
    assert set.union(*classes(browser)) <= {"blank"}
    browser.press("HOME", *["ARROW_RIGHT"] * 12, on=".tokens input")  # 6 of 48 tokens a head
    browser.press("HOME", on=".words")
    kept = []
    for _ in range(48):
        reading = browser.texts(".reading")[0]
        kept.append(int(reading.split("kept by ")[1].split(" of 4 heads")[0]))
        browser.press("ARROW_RIGHT", on=".words")
    assert sum(kept) == 4 * 6
    marks = [("gone" in names, "lost" in names) for names in classes(browser)]
    assert marks == [(count < 2, count == 0) for count in kept]
    browser.press("l", on=".tokens .head")  # the first head alone
    assert sum("lost" not in names for names in classes(browser)) == 6


def test_a_token_s_rank_is_read_by_arrow_keys_and_by_a_press(page, made) -> None:
    browser = page(made(["<b>", "\n", " ", "</script>"]))
    spans = browser.every(".pane:first-child .words span")
    assert browser.texts(".pane:first-child .words span") == ["<b>", "↵\n", " ", "</script>"]
    spans[0].click()
    assert browser.texts(".reading")[0].startswith('first: token 1, "<b>": rank 1 of 4, stays')
    browser.press("END", on=".words")
    reading = browser.texts(".reading")[0]
    assert reading.startswith('first: token 4, "</script>": rank 4 of 4, stays down to 1')
    assert spans[3].get_attribute("title") == reading.removeprefix("first: ")
    assert "current" in spans[3].get_attribute("class")


def test_the_other_text_is_read_with_its_own_ranks(page, made) -> None:
    result = made(["a", "b", "c"])
    result["texts"] += made(["x", "y"], "other")["texts"]
    browser = page(result)
    browser.press("o", on=".tokens .text")
    assert browser.texts(".pane:first-child .words span") == ["x", "y"]
    browser.press("END", on=".words")
    assert "rank 2 of 2" in browser.texts(".reading")[0]
