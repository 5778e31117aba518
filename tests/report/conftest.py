"""Evaluations to show, made by the real functions on a tiny model or by hand, and a browser."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvenv import models
from kvenv.evaluation import statistics
from kvenv.evaluation.retention import measure
from kvenv.evaluation.tasks import TASKS, evaluate_tasks
from kvenv.evaluation.texts import token_view
from kvenv.recording import recorder
from kvenv.recording.workload import Sample
from kvenv.report import render
from kvenv.scorers import load_scorer

Result = dict[str, Any]


class Questions:
    """Random tokens that are an answered question and a conversation at once."""

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        ids = rng.integers(32, 127, prompt_tokens + future_tokens).tolist()
        facts = {"task": "vt", "answers": ["a"], "turns": [0, 20, 40]}
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], f"document {index}", facts)


@pytest.fixture(scope="session")
def measured(checkpoints, quick_agent, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What evaluating four agents in every way gives; not to be changed."""
    model, tokenizer = models.load(str(checkpoints(0)))
    traces = recorder.record(
        model,
        tokenizer,
        Questions(),
        tmp_path_factory.mktemp("report") / "set",
        episodes=3,
        prompt_tokens=48,
        future_tokens=8,
        name="questions",
    )
    scorers = {name: load_scorer(name) for name in ("random", "knorm", "oracle")}
    scorers["kvp"] = quick_agent("kvp").fit([traces])
    return {
        "format": "kvenv-evaluation",
        "version": 2,
        **statistics.provenance(),
        "model": "tiny",
        "model_layers": 2,
        "kv_heads": 2,
        "traces": [traces.manifest.origin],
        **statistics.summarise(measure([traces], scorers)),
        "texts": [token_view(traces, index, scorers, tokenizer) for index in range(2)],
        **evaluate_tasks(
            model,
            tokenizer,
            [traces],
            scorers,
            TASKS,
            budgets=(0.5, 0.25),
            token_budgets=(32,),
            recent=4,
        ),
    }


@pytest.fixture
def evaluation(measured: Result) -> Result:
    """A copy of `measured`."""
    return copy.deepcopy(measured)


@pytest.fixture
def published() -> Result:
    """An evaluation's record of version 1."""
    return json.loads((Path(__file__).parent / "version1.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def made() -> Callable[..., Result]:
    """Makes the least evaluation with a token view: one head, agents "first" and "last"."""

    def make(tokens: list[str], document: str = "text", **more: Any) -> Result:
        n = len(tokens)
        ranks = {"first": np.arange(n), "last": np.arange(n)[::-1]}
        agents = {
            name: {"ranks": base64.b64encode(order.astype("<u2").tobytes()).decode()}
            for name, order in ranks.items()
        }
        return {
            "format": "kvenv-evaluation",
            "version": 2,
            "heads": [[5, 0]],
            "texts": [{"document": document, "tokens": tokens, "agents": agents}],
            **more,
        }

    return make


FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


class Browser:
    """A page in Chromium; elements are given by their CSS selectors, keys by their names."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.command = driver.execute_cdp_cmd
        self.run = driver.execute_script

    def every(self, css: str) -> list[Any]:
        """All elements that match."""
        return self.driver.find_elements("css selector", css)

    def at(self, css: str) -> Any:
        """The first element that matches."""
        return self.driver.find_element("css selector", css)

    def texts(self, css: str) -> list[str]:
        """The text of all that match, shown or not."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css
        )

    def press(self, *keys: str, on: str | None = None) -> None:
        """Press keys, on an element or where the focus is."""
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            place = self.driver.switch_to.active_element if on is None else self.at(on)
            place.send_keys(getattr(Keys, key, key))

    def focused(self, attribute: str) -> str:
        """An attribute of what has the focus."""
        return self.driver.switch_to.active_element.get_attribute(attribute)

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        self.driver.execute_async_script(
            "requestAnimationFrame(() => setTimeout(arguments[0], 50))"
        )

    def logged(self) -> tuple[list[str], set[str]]:
        """What the console was told since last asked, and the schemes of all that was loaded."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        log = self.driver.get_log("performance")
        events = [json.loads(entry["message"])["message"] for entry in log]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return told, {params["request"]["url"].split(":")[0] for params in sent}


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; skips where it, its driver or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium or chromedriver is not on PATH: install chromium, chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield Browser(opened)
    opened.quit()


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Opens results as a page of some width; nothing may be told or fetched meanwhile."""

    def show(*results: Result, width: int = 1200, scripts: bool = True, dark: bool = False) -> Any:
        file = tmp_path / "report.html"
        file.write_text(render(results), encoding="utf-8")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chromium.command("Emulation.setDeviceMetricsOverride", size)
        chromium.command("Emulation.setEmulatedMedia", {"features": [scheme]})
        chromium.command("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        chromium.driver.get(file.as_uri())
        return chromium

    chromium.driver.get("about:blank")
    chromium.logged()
    yield show
    chromium.command("Emulation.setScriptExecutionDisabled", {"value": False})
    assert chromium.logged() == ([], {"file"})
