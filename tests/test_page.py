"""The page, in a browser: type, stream, stop, reload, a phone's width, and text that would be a script."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.live import LiveServer, live_server

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server("--backend", "numpy", log=tmp_path_factory.mktemp("page") / "log") as live:
        yield live


@pytest.fixture(scope="module")
def chromium() -> str:
    """Debian's browser and its driver, installed where that is allowed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")) and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "chromium", "chromium-driver"], capture_output=True
        )
    found = shutil.which("chromium")
    if not (found and shutil.which("chromedriver")):
        pytest.skip("chromium and chromium-driver are not installed")
    return found


@pytest.fixture
def browser(chromium: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    width = getattr(request, "param", 1200)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},800"):
        options.add_argument(flag)
    options.binary_location = chromium
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    driver.quit()
    # Hostile HTML is parsed before it is cleaned, and its handlers meet the page's policy there.
    assert not [message for message in severe if "inline event handler" not in message]


def until(driver: Any, what: Callable[[], Any], seconds: float = 40.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"it does not happen; the page says {driver.find_element('id', 'turns').text!r}")


def say(driver: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = driver.find_element("id", "input")
    field.send_keys(text)
    field.send_keys(Keys.ENTER)


def turns(driver: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#turns .user, #turns .assistant')].map((one) => one.innerText)"
    )
    found: list[str] = driver.execute_script(script)
    return found


def idle(driver: Any) -> bool:
    return bool(driver.find_element("id", "send").is_displayed())


def test_a_conversation_streams_and_survives_a_reload(browser: Any, server: LiveServer) -> None:
    browser.get(server.url)
    until(browser, lambda: "slots" in browser.find_element("id", "status").text)
    say(browser, "Return the file")
    until(browser, lambda: len(turns(browser)) == 2 and turns(browser)[1])
    until(browser, lambda: idle(browser))
    assert "tokens/s" in browser.find_element("css selector", ".facts").text
    before = turns(browser)
    browser.refresh()
    until(browser, lambda: turns(browser) == before)
    say(browser, "And a socket")
    until(browser, lambda: len(turns(browser)) == 4 and idle(browser))
    browser.find_element("css selector", ".facts button").click()  # retry
    until(browser, lambda: len(turns(browser)) == 4 and idle(browser))
    assert turns(browser)[:3] == [*before, "And a socket"]


def test_stop_keeps_what_is_there(browser: Any, server: LiveServer) -> None:
    browser.get(server.url)
    # Answers of the demo model end soon: the page is told to ask for one that does not.
    browser.execute_script(
        "const real = window.fetch; window.fetch = (url, options) => { if (options?.body) options.body ="
        " JSON.stringify({...JSON.parse(options.body), logit_bias: {0: -100}, temperature: 3, top_p: 1});"
        " return real(url, options); };"
    )
    say(browser, "Go on forever")
    until(browser, lambda: len(turns(browser)) == 2 and turns(browser)[1])
    if not idle(browser):
        browser.find_element("id", "stop").click()
    until(browser, lambda: idle(browser))
    assert turns(browser)[1]


def test_text_of_a_model_is_no_script(browser: Any, server: LiveServer) -> None:
    browser.get(server.url)
    evil = (
        "<img src=x onerror='window.bad=1'><script>window.bad=2</script>[x](javascript:window.bad=3) **bold**"
    )
    browser.execute_script(
        "localStorage.setItem('rwkv_npu conversations', JSON.stringify([{id: 'x', title: arguments[0], system: '',"
        " preset: '', turns: [{role: 'user', content: arguments[0]}, {role: 'assistant', content: arguments[0]}]}]))",
        evil,
    )
    browser.refresh()
    until(browser, lambda: len(turns(browser)) == 2)
    assert turns(browser)[0] == evil and "bold" in turns(browser)[1]
    for link in browser.find_elements("css selector", ".assistant a"):
        assert not (link.get_attribute("href") or "").startswith("javascript:")
    assert browser.execute_script("return window.bad") is None
    assert not browser.find_elements("css selector", ".assistant script, .assistant img")


@pytest.mark.parametrize("browser", [500], indirect=True)
def test_a_phone_shows_all_of_it(browser: Any, server: LiveServer) -> None:
    browser.get(server.url)
    say(browser, "A long message " * 20)
    until(browser, lambda: idle(browser) and len(turns(browser)) == 2)
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    assert not browser.find_element("id", "side").is_displayed()
    browser.find_element("id", "menu").click()
    assert browser.find_element("id", "side").is_displayed()
