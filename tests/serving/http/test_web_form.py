"""The form, driven in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="a browser needs a server")
pytest.importorskip("playwright.sync_api", reason="nothing drives a browser here")

import uvicorn
from playwright import sync_api as playwright

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.worker import Worker
from stepfusion_testing.http_service import Gate, gated_engine, idle, until

playwright.expect.set_options(timeout=60_000)  # a busy machine takes its time


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"there is no browser to drive: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, Gate, AsyncEngine]]:
    """A served engine."""
    gate, engine = gated_engine()
    service = AsyncEngine(engine, queue=16)
    server = uvicorn.Server(uvicorn.Config(make_app(service, name="pets"), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started and service.ready)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", gate, service
    gate.opened.set()
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser: Any, site: tuple[str, Gate, AsyncEngine]) -> Iterator[Any]:
    """The form, with the model's facts in it; nothing on it may fail."""
    url, gate, _ = site
    gate.opened.set()
    context = browser.new_context()
    page, faults = context.new_page(), list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else faults.append(request.url))
    page.goto(url)
    playwright.expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    yield page
    gate.opened.set()
    context.close()
    assert faults == []


def fill(page: Any, **fields: str) -> None:
    for name, value in fields.items():
        page.get_by_label(name, exact=False).and_(page.locator("input")).fill(value)


def test_images_appear_as_the_engine_makes_them(page: Any, site: tuple[str, Gate, AsyncEngine]) -> None:
    _, gate, service = site
    gate.opened.clear()
    fill(page, Steps="5", Images="3", Seed="18446744073709551615", Guidance="1.5", Eta="0.5")
    for name in ("Cat", "Dog"):
        page.get_by_role("checkbox", name=name).check()
    page.get_by_role("button", name="Generate").click()
    bar = page.get_by_role("progressbar")
    playwright.expect(bar).to_be_visible()
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_visible()
    playwright.expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    gate.opened.set()
    links = page.get_by_role("link", name="Download")
    playwright.expect(links).to_have_count(3)
    playwright.expect(bar).to_be_hidden()
    playwright.expect(page.get_by_role("status")).to_contain_text("3 images in ")
    engine = service.engine
    arguments = {"steps": 5, "eta": 0.5, "guidance": 1.5, "seed": 2**64 - 1, "labels": [0, 1, 0]}
    wanted = engine.to_uint8(engine.sample(3, **arguments, progress=False)).numpy()
    for i, name in enumerate(["Cat", "Dog", "Cat"]):
        alt = f"{name}, seed {2**64 - 1}, index {i}"
        source = page.get_by_role("img", name=alt, exact=True).get_attribute("src")
        png = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        np.testing.assert_array_equal(np.asarray(png), wanted[i, ..., 0])
        assert links.nth(i).get_attribute("download") == f"{2**64 - 1}-{i}.png"


def test_previews_and_the_bar_move_while_it_denoises(page: Any, site: tuple[str, Gate, AsyncEngine]) -> None:
    _, gate, service = site
    network, cancel = Gate.__call__, Worker.cancel
    calls, cancelled = [], threading.Event()

    def hold(self: Gate, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            gate.opened.clear()
        return network(self, *arguments)

    def note(self: Worker, number: int) -> None:
        cancel(self, number)
        cancelled.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "__call__", hold)
        patch.setattr(Worker, "cancel", note)
        fill(page, Steps="60", Images="2")
        page.get_by_role("button", name="Generate").click()
        playwright.expect(page.get_by_text(re.compile("^step (6|12|18) of 60$"))).to_have_count(2)
        assert page.get_by_role("progressbar").get_attribute("value") is not None
        assert 0 < float(page.get_by_role("progressbar").evaluate("bar => bar.value")) < 1
        assert page.get_by_role("img", name=re.compile("^Image 0, step (6|12|18) of 60$")).count() == 1
        page.get_by_role("button", name="Stop").click()
        playwright.expect(page.get_by_role("status")).to_have_text("Stopped.")
        # the page says so before the server has seen that the connection is closed
        assert cancelled.wait(60), "the server did not cancel the request"
        gate.opened.set()
        until(lambda: idle(service))
        assert len(calls) <= 22, "the lanes were freed by the next tick"


def test_what_is_wrong_is_said_and_put_right(page: Any) -> None:
    problem = page.get_by_role("alert")
    for name, value, message in (
        ("Steps", "banana", "steps must be an integer of at least 1, got 'banana'"),
        ("Images", "65", "n is too large: 65 images, and a request may have 64"),
        ("Seed", "-1", "seed must be an integer from 0 to 2**64 - 1"),
    ):
        before = page.get_by_label(name, exact=True).input_value()
        fill(page, **{name: value})
        page.get_by_role("button", name="Generate").click()
        playwright.expect(problem).to_contain_text(message)
        fill(page, **{name: before})
    page.get_by_role("button", name="Generate").click()
    playwright.expect(page.get_by_role("link", name="Download")).to_have_count(8)
    playwright.expect(problem).to_be_hidden()


def test_eta_is_asked_for_with_samplers_that_take_one(page: Any) -> None:
    eta, sampler, problem = page.get_by_label("Eta"), page.get_by_label("Sampler"), page.get_by_role("alert")
    playwright.expect(eta).to_be_visible()
    playwright.expect(eta).to_have_attribute("placeholder", "0")
    fill(page, Steps="3", Images="1", Eta="7")
    sampler.select_option("euler_ancestral")
    playwright.expect(eta).to_be_visible()
    playwright.expect(eta).to_have_attribute("placeholder", "1")
    page.get_by_role("button", name="Generate").click()
    playwright.expect(problem).to_have_text("eta must be a finite number in [0, 1], got 7.0")
    sampler.select_option("ddpm")
    playwright.expect(eta).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    playwright.expect(page.get_by_role("link", name="Download")).to_have_count(1)


def test_the_steps_are_spaced_as_asked_for(page: Any, site: tuple[str, Gate, AsyncEngine]) -> None:
    engine = site[2].engine
    spacing = page.get_by_label("Spacing")
    assert spacing.locator("option").all_inner_texts() == [
        "default",
        "leading",
        "trailing",
        "linspace",
        "karras",
        "exponential",
        "lambda",
        "beta",
    ]
    spacing.select_option("trailing")
    fill(page, Steps="3", Images="1", Guidance="1")
    page.get_by_role("button", name="Generate").click()
    picture = page.get_by_role("img", name="no class, seed 0, index 0", exact=True)
    playwright.expect(picture).to_be_visible()
    png = Image.open(io.BytesIO(base64.b64decode(picture.get_attribute("src").partition(",")[2])))
    wanted = engine.to_uint8(engine.sample(1, engine.table(steps=3, spacing="trailing"), progress=False)).numpy()
    np.testing.assert_array_equal(np.asarray(png), wanted[0, ..., 0])


def test_every_control_has_a_name(page: Any) -> None:
    for control in page.locator("input, select, button, progress").all():
        named = control.evaluate(
            "e => e.ariaLabel || e.textContent || [...(e.labels || [])].map(l => l.textContent).join()"
        )
        assert named, control


def test_a_random_seed_is_drawn_and_used(page: Any) -> None:
    seed, draw = page.locator("#seed"), page.get_by_role("button", name="Random seed")
    drawn = set()
    for _ in range(3):
        draw.click()
        drawn.add(int(seed.input_value()))
    assert len(drawn) == 3
    assert max(drawn) < 2**53
    fill(page, Steps="2", Images="1")
    page.get_by_role("button", name="Generate").click()
    alt = f"no class, seed {seed.input_value()}, index 0"
    playwright.expect(page.get_by_role("img", name=alt, exact=True)).to_be_visible()


@pytest.mark.parametrize("width", [1200, 390])
def test_fields_line_up_and_results_come_first_on_a_phone(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    tops = {name: page.locator(f"#{name}").bounding_box()["y"] for name in ("guidance", "n", "seed", "draw")}
    assert tops["guidance"] == tops["n"], "whatever their labels say"
    assert tops["seed"] == tops["draw"]
    form, results = (page.locator(name).bounding_box() for name in ("#form", "#results"))
    if width < 800:
        assert results["y"] + results["height"] <= form["y"]
    else:
        assert results["y"] == form["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing stands out at the side"
