"""The transcript viewer in a real headless browser: what a person sees, clicks and types.

*Covered*: Chromium. *Not covered*: other browsers, screen readers, touch.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.types import StopReason
from tests.support import ROOT
from tests.support.written_runs import HOSTILE, make_rollout, word, write_run
from trainer.reports.transcripts.write import write_transcripts

BENCH = str(ROOT / "scripts" / "bench")


def bench(name: str) -> Any:
    sys.path.insert(0, BENCH)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(BENCH)


driver = bench("browser")
pytestmark = pytest.mark.skipif(driver.installed() is None, reason=driver.HOW_TO_INSTALL)


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with driver.browser() as window:
        yield window


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training rollouts over three steps and two held-out ones, one of them hostile."""
    rollouts = {
        f"rollouts/step-{step:06d}.jsonl": [
            make_rollout(
                f"r-step{step}-{k}",
                reward=0.25 * k if step < 3 or k else None,
                stop=StopReason.MAX_TURNS if k == 3 else StopReason.ANSWERED,
                tool="cat" if k == 1 else "search",
            )
            for k in range(4)
        ]
        for step in (1, 2, 3)
    }
    held_out = [make_rollout("r-eval3-0"), make_rollout(f"r-last {HOSTILE}", output=HOSTILE)]
    run = write_run(tmp_path_factory.mktemp("viewer") / "run", rollouts | {"evals/step-000003.jsonl": held_out})
    (run / "run.json").write_text(json.dumps({"run_id": HOSTILE}))
    return write_transcripts(run, lambda i: HOSTILE if i == 42 else word(i))


@pytest.fixture
def opened(window: Any, page: Path) -> Iterator[Any]:
    open_at(window, page.as_uri())
    yield window
    assert window.errors() == [], "nothing was refused by the page's policy, and no script failed"


def open_at(window: Any, url: str) -> None:
    # A link into the page that is open already would not load it anew.
    window.open("about:blank")
    window.open(url)
    window.wait("return document.documentElement.dataset.ready")


def texts(window: Any, selector: str) -> list[str]:
    # Half a surrogate pair can't be sent to us.
    source = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.toWellFormed())"
    found: list[str] = window.script(source, selector)
    return found


def shown(window: Any) -> str:
    """The id of the rollout whose transcript is on the screen."""
    return texts(window, "h2 a")[0]


def listed(window: Any) -> list[str]:
    return texts(window, ".entry div:first-child span:first-child")


def set_filter(window: Any, **values: object) -> None:
    window.script(
        "for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value;"
        "document.getElementById('filters').dispatchEvent(new Event('input', {bubbles: true}))",
        values,
    )


def go_to(window: Any, keys: str, rollout_id: str) -> None:
    window.keys(keys)
    window.wait(f"return document.querySelector('h2 a')?.textContent === {json.dumps(rollout_id)}", timeout_s=20)


def open_tokens(window: Any) -> None:
    window.click("#tab-tokens")
    window.wait("return document.querySelectorAll('.token').length")


def test_it_opens_on_the_first_rollout_and_lists_all(opened):
    assert texts(opened, "#count") == ["14 of 14 rollouts, mean reward 0.5"]
    assert shown(opened) == "r-step1-0"
    assert listed(opened)[:2] == ["task of r-step1-0", "task of r-step1-1"] and len(listed(opened)) == 14
    assert texts(opened, "#notes li") == []
    assert texts(opened, ".message pre") == [
        "be brief",
        "how much?",
        "I look it up",
        'search({"query": "revenue"})',
        "Revenue 42",
        "42",
    ]
    assert texts(opened, ".grade p") == ["as it should be"]
    assert any("250 ms" in role for role in texts(opened, ".tool .role"))


def test_it_fetches_nothing(opened):
    assert opened.script("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_hostile_text_is_shown_as_text_and_nothing_of_it_runs(opened, page):
    rows = listed(opened)
    opened.script("document.querySelectorAll('.entry')[arguments[0]].click()", len(rows) - 1)
    opened.wait("return document.querySelector('h2 a').textContent.includes('onerror')")
    same = (
        "return [...document.querySelectorAll(arguments[0])].filter((e) => e.textContent === JSON.parse(arguments[1]))"
    )
    assert opened.script(f"{same}.length", ".tool pre", json.dumps(HOSTILE)) == 1, "to the last character"
    open_tokens(opened)
    assert opened.script(f"{same}.length", ".token", json.dumps(HOSTILE)) == 2
    assert opened.script("return window.pwned ?? null") is None
    assert opened.script("return document.querySelectorAll('img, iframe, object, form[action]').length") == 0
    assert "window.pwned = 1" in texts(opened, "h1 small")[0]
    url = opened.script("return location.href")
    open_at(opened, url)
    assert "onerror" in shown(opened), "its link leads back to it"


def test_next_and_previous_by_button_and_by_key(opened):
    opened.click("#next")
    opened.wait("return document.querySelector('h2 a').textContent === 'r-step1-1'")
    assert opened.script("return location.hash") == "#r-step1-1"
    go_to(opened, "j", "r-step1-2")
    go_to(opened, "k", "r-step1-1")
    opened.click("#previous")
    opened.wait("return document.querySelector('h2 a').textContent === 'r-step1-0'")
    assert texts(opened, ".entry[aria-selected=true] span:first-child")[0] == "task of r-step1-0"
    opened.script("document.getElementById('next').focus()")
    go_to(opened, "\ue007", "r-step1-1")  # enter, and again: the focus stays on the button
    go_to(opened, "\ue007", "r-step1-2")
    go_to(opened, "kk", "r-step1-0")
    opened.script("document.getElementById('list').focus()")
    go_to(opened, "\ue015", "r-step1-1")  # arrow down
    opened.keys("\ue010")  # end
    opened.wait("return document.querySelector('h2 a').textContent.includes('onerror')")
    go_to(opened, "\ue011", "r-step1-0")  # home


def test_a_link_opens_its_rollout_and_an_unknown_one_says_so(window, page):
    open_at(window, page.as_uri() + "#r-step2-3")
    assert shown(window) == "r-step2-3"
    assert texts(window, ".entry[aria-selected=true] span:first-child")[0] == "task of r-step2-3"
    window.script("location.hash = 'r-step3-1'")
    window.wait("return document.querySelector('h2 a').textContent === 'r-step3-1'")
    open_at(window, page.as_uri() + "#<b>nobody%")
    assert "There is no rollout" in texts(window, "#detail")[0] and "nobody" in texts(window, "#detail")[0]
    assert window.errors() == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"set": "held out"}, 2),
        ({"step": "3"}, 6),
        ({"step": "3", "set": "training"}, 4),
        ({"low": "0.5", "high": "0.75", "set": "training"}, 6),
        ({"high": "0"}, 2),
        ({"stop": "max_turns"}, 3),
        ({"tool": "=cat"}, 3),
        ({"tool": "none"}, 0),
        ({"search": "STEP2"}, 4),
    ],
)
def test_filters_keep_what_they_say(opened, values, expected):
    set_filter(opened, **values)
    assert len(listed(opened)) == expected
    assert texts(opened, "#count")[0].startswith(f"{expected} of 14 rollouts")
    opened.click("button[type=reset]")
    opened.wait("return document.querySelectorAll('.entry').length === 14")


def test_sorting_and_next_go_together_and_what_has_no_value_comes_last(opened):
    set_filter(opened, sort="reward, lowest first", set="training", step="3")
    assert listed(opened) == [f"task of r-step3-{k}" for k in (1, 2, 3, 0)]
    assert texts(opened, ".score") == ["0.25", "0.5", "0.75", "no grade"]
    go_to(opened, "j", "r-step3-1")
    go_to(opened, "j", "r-step3-2")
    set_filter(opened, sort="reward, highest first")
    assert listed(opened) == [f"task of r-step3-{k}" for k in (3, 2, 1, 0)]


def test_a_letter_typed_into_the_search_is_no_command(opened):
    opened.keys("/")
    opened.keys("jk")
    assert opened.script("return document.getElementById('search').value") == "jk"
    assert shown(opened) == "r-step1-0"


def test_tokens_carry_their_figures_as_colour_and_on_hover(opened):
    open_tokens(opened)
    assert opened.script("return document.querySelectorAll('.token').length") == 9
    trained = "return [...document.querySelectorAll('.token')].map((e) => e.classList.contains('trained') ? 1 : 0)"
    assert opened.script(trained) == [0, 0, 0, 1, 1, 0, 0, 1, 1]

    def colours(key: str) -> list[str]:
        opened.keys(key)
        return opened.script(
            "return [...document.querySelectorAll('.token')].map((e) => e.matches('.high, .low') ?"
            " (e.matches('.high') ? '+' : '-') + Math.round(e.style.getPropertyValue('--amount')) : '')"
        )

    assert colours("1") == ["", "", "", "+32", "+32", "", "", "+32", "+32"]
    assert colours("2") == ["", "", "", "-31", "-3", "", "", "-13", "-2"]
    # exp(-1 + 1.25), 1, exp(-0.75 + 0.5), 1
    assert colours("3") == ["", "", "", "+27", "+0", "", "", "-27", "+0"]
    assert colours("4") == ["", "", "", "+75", "+75", "", "", "+75", "+75"]
    background = "return getComputedStyle(document.querySelectorAll('.token')[arguments[0]]).backgroundColor"
    assert opened.script(background, 3) != opened.script(background, 0) == "rgba(0, 0, 0, 0)"

    opened.hover(".token:nth-of-type(4)")
    values = dict(zip(texts(opened, "#hover dt"), texts(opened, "#hover dd"), strict=True))
    assert values == {
        "token": "20, at position 3",
        "mask": "trainable, written by policy version 3",
        "sampler's log-probability": "−1.25 (28.65 %)",
        "trainer's log-probability": "−1 (36.79 %)",
        "ratio": "1.284025",
        "advantage": "+0.5",
    }
    assert texts(opened, "#hover code") == ['" w20"']
    opened.hover(".token:nth-of-type(1)")
    assert texts(opened, "#hover dd") == ["10, at position 0", "not trainable: context"]


def test_the_arrow_keys_go_through_the_tokens(opened):
    open_tokens(opened)
    opened.script("document.querySelector('.tokens').focus()")
    opened.keys("\ue014\ue014\ue014\ue014\ue012")  # right four times, left
    assert texts(opened, "#hover code") == ['" w12"']
    opened.keys("\ue00c")  # escape
    assert opened.script("return document.getElementById('hover').hidden")


def test_an_evaluation_has_neither_ratio_nor_advantage(window, page):
    open_at(window, page.as_uri() + "#r-eval3-0")
    open_tokens(window)
    for key, word_in_legend in (("3", "no ratio here"), ("4", "no advantage here")):
        window.keys(key)
        assert word_in_legend in texts(window, "#legend")[0]
        assert window.script("return document.querySelectorAll('.token.high, .token.low').length") == 0


def test_a_run_that_kept_no_figures_shows_the_rest(window, tmp_path):
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [make_rollout("r-0")]}, advantage=None)
    open_at(window, write_transcripts(run, None).as_uri())
    assert len(texts(window, "#notes li")) == 2
    open_tokens(window)
    assert texts(window, ".token")[0] == "⟨10⟩"
    window.keys("2")
    assert window.script("return document.querySelectorAll('.token.low').length") == 4
    assert window.errors() == []


def test_it_follows_the_dark_mode(opened):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = opened.script(background)
    opened.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert opened.script(background) != light == "rgb(255, 255, 255)"
    opened.devtools("Emulation.setEmulatedMedia", features=[])


def test_a_long_run_draws_only_what_is_in_sight_and_unpacks_only_what_is_read(window, tmp_path):
    run = bench("transcripts_open").synthetic_run(tmp_path / "run", num_rollouts=1500, num_tokens=60)
    page = write_transcripts(run, word)
    window.open("about:blank")
    # What the page unpacks, counted from outside: its own policy lets no test script in before it runs.
    window.devtools("Page.enable")
    counter = (
        "window.unpacked = 0; const old = window.atob; window.atob = (s) => { window.unpacked += 1; return old(s) }"
    )
    added = window.devtools("Page.addScriptToEvaluateOnNewDocument", source=counter)
    window.open(page.as_uri())
    window.wait("return document.documentElement.dataset.ready")
    window.devtools("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
    assert texts(window, "#count")[0].startswith("1,500 of 1,500")
    assert len(listed(window)) < 60
    assert window.script("return window.unpacked") == 2, "the index and the first rollout's chunk"
    chunks = window.script("return document.querySelectorAll('script[id^=chunk]').length")
    assert chunks > 20
    window.script("document.getElementById('list').scrollTop = 1e9")
    window.wait("return document.querySelector('.entry:last-child').getAttribute('aria-posinset') === '1500'")
    assert len(listed(window)) < 60
    window.script("document.querySelector('.entry:last-child').click()")
    last = window.script("return document.querySelector('.entry:last-child span').textContent")
    window.wait(f"return document.querySelector('h2').firstChild.textContent === {json.dumps(last)}")
    assert window.script("return window.unpacked") == 3
    assert window.errors() == []
