"""The demo's real page in Chromium: a tiny random LLaVA, a slow model and one that fails; then two that answer, for the votes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from llava_tiny import picture, tiny_llm, tiny_tower
from test_demo import Scripted
from test_demo_tabs import write_run

from apps import demo
from apps.chat_session import ModelShelf
from apps.votes import Votes
from llm_stage.chat_format import ChatFormat
from llm_stage.generate import ChatModel
from llm_stage.llava import build_llava

pytestmark = pytest.mark.slow
IMAGES = ("red", "green", "blue")
SERIOUS = ("serious", "critical")


def tiny_chat(name: str, seed: int = 0) -> ChatModel:
    """A tiny random LLaVA that does not repeat one token for ever."""
    llm, tokenizer = tiny_llm(seed, tie=False)
    with torch.no_grad():
        llm.get_input_embeddings().weight.mul_(10)  # spreads the logits
    model, processor = build_llava(tiny_tower(seed), (llm, tokenizer))
    return ChatModel(model.eval(), processor, ChatFormat(processor.tokenizer, "own"), name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with three models."""
    place = tmp_path_factory.mktemp("three")
    slow = Scripted(
        "slow", " ".join(f"word{number}" for number in range(6000)), 0.05
    )  # it never comes to its end, however long a busy machine takes to press Stop
    shelf = ModelShelf([tiny_chat("tiny"), slow, Scripted("broken", error=RuntimeError("the tower's <b>width</b> does not fit"))])
    blocks = demo.build_page(shelf, [picture(colour, (96, 96)) for colour in IMAGES], votes=Votes(place / "votes.sqlite"), runs=place)
    yield demo.launch(blocks)
    blocks.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page with two models that answer and a run to browse; and the file of its votes."""
    place = tmp_path_factory.mktemp("pair")
    write_run(place / "runs/mine")
    shelf, votes = ModelShelf([tiny_chat("one"), tiny_chat("two", 1)]), place / "votes.sqlite"
    blocks = demo.build_page(shelf, [picture(colour, (96, 96)) for colour in IMAGES], votes=Votes(votes), runs=place / "runs")
    yield demo.launch(blocks), votes
    blocks.close()


@pytest.fixture
def watched(chromium: Any) -> Iterator[Any]:
    """Opens pages whose every request must go to loopback, and whose console must stay clean."""
    requests: list[str] = []
    complaints: list[str] = []

    def open_page(url: str, width: int, height: int, **look: Any) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": height}, **look)
        page.set_default_timeout(120_000)  # a busy two-core machine takes half a minute to draw the page the first time
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url.replace("ws", "http", 1)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#mm-examples button.thumbnail-item")
        return page

    def alone(url: str) -> Any:
        page = chromium.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    open_page.alone = alone  # type: ignore[attr-defined]
    yield open_page
    outside = [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:"))]
    assert len(requests) > 5
    assert outside == []
    assert complaints == []


@pytest.mark.parametrize("width,height", [(1280, 860), (390, 844)], ids=["desktop", "phone"])
def test_upload_ask_stream_stop_in_a_browser(served: str, watched: Any, width: int, height: int, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    picture("blue", (120, 80)).save(upload)
    page = watched(served, width, height)
    page.set_input_files("#mm-image input[type=file]", upload)
    page.wait_for_selector("#mm-image img")
    page.fill("#mm-question textarea", "what colour is it")
    page.click("#mm-ask-button")

    page.wait_for_selector(".mm-answer:nth-child(2).mm-writing >> text=word3")  # streamed: words are there while it writes
    page.wait_for_selector(".mm-answer.mm-failed >> text=RuntimeError: the tower's <b>width</b> does not fit")
    page.wait_for_selector(".mm-answer:nth-child(2) >> text=first token")
    page.wait_for_selector(".mm-answer:nth-child(1).mm-done >> text=in all")
    assert page.locator(".mm-ask img").count() == 1
    page.click("#mm-stop-button")
    page.wait_for_selector(".mm-answer:nth-child(2).mm-stopped >> text=word3")
    assert "word5999" not in page.inner_text(".mm-answer:nth-child(2)")

    page.wait_for_selector("#mm-ask-button:not([disabled])")
    page.click("#mm-presets button >> nth=1")  # a preset asks at once
    page.wait_for_selector(".mm-round:nth-child(2) .mm-answer.mm-writing")
    page.click("#mm-stop-button")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
    page.click("#mm-clear")
    page.wait_for_selector(".mm-empty")
    page.close()


def test_examples_bad_files_and_empty_questions_in_a_browser(served: str, watched: Any, tmp_path: Path) -> None:
    broken = tmp_path / "notes.jpg"
    broken.write_text("this is no picture")
    page = watched(served, 1000, 800)
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-notice >> text=the question is empty")

    page.set_input_files("#mm-image input[type=file]", broken)
    page.wait_for_selector("#mm-image img", state="attached")
    page.fill("#mm-question textarea", "what is it")
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-notice >> text=notes.jpg")
    assert page.locator(".mm-answer").count() == 0

    page.click("#mm-examples button.thumbnail-item >> nth=1")
    page.wait_for_function("document.querySelector('#mm-image img') && document.querySelector('#mm-image img').naturalWidth > 0")
    page.fill("#mm-question textarea", "what is it")
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-answer:nth-child(1).mm-done")
    assert page.locator(".mm-notice").count() == 0
    page.click("#mm-stop-button")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    page.close()


def test_two_people_do_not_see_each_other(served: str, watched: Any) -> None:
    first, second = watched(served, 900, 700), watched(served, 900, 700)
    first.fill("#mm-question textarea", "the first one's question")
    first.click("#mm-ask-button")
    first.wait_for_selector(".mm-ask >> text=the first one's question")
    second.fill("#mm-question textarea", "the second one's question")
    second.click("#mm-ask-button")
    second.wait_for_selector(".mm-ask >> text=the second one's question")
    assert "first one" not in second.inner_text("#mm-conversation")
    assert "second one" not in first.inner_text("#mm-conversation")
    for page in (first, second):
        page.click("#mm-stop-button")
        page.wait_for_selector("#mm-ask-button:not([disabled])")
        page.close()


def test_ask_again_edit_save_and_open_in_a_browser(pair: tuple[str, Path], watched: Any, tmp_path: Path) -> None:
    page = watched(pair[0], 1200, 900)
    page.click("#mm-save-page")
    page.wait_for_selector(".mm-notice >> text=nothing to save")
    choose_example(page, 0)
    ask(page, "what colour is it")
    page.click("#mm-again")
    page.wait_for_selector(".mm-attempt >> text=asked 2 times")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    page.click("#mm-edit")
    page.wait_for_function("document.querySelector('#mm-question textarea').value === 'what colour is it'")
    ask(page, "what color is it")
    assert page.locator(".mm-round").count() == 1
    assert "what color is it" in page.inner_text(".mm-ask")
    files = {}
    for kind, button in (("json", "#mm-save-json"), ("html", "#mm-save-page")):
        with page.expect_download() as download:
            page.click(button)
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert json.loads(files["json"].read_text())["rounds"][0]["question"] == "what color is it"
    for file in files.values():  # either one loads back, and the conversation goes on
        page.click("#mm-clear")
        page.wait_for_selector(".mm-empty")
        page.set_input_files("input[type=file][accept*=json]", file)
        page.wait_for_selector(".mm-round >> text=what color is it")
        page.wait_for_function("document.querySelector('#mm-image img')?.naturalWidth > 0")
    ask(page, "and now")
    assert page.locator(".mm-round").count() == 2
    assert page.locator(".mm-ask img").count() == 1  # the same image as before, so it is shown once
    alone = watched.alone(files["html"].as_uri())
    alone.wait_for_selector(".mm-round >> text=what color is it")
    assert alone.evaluate("document.querySelector('.mm-ask img').naturalWidth") == 96
    alone.close()
    page.close()


def test_two_blind_votes_and_their_table_in_a_browser(pair: tuple[str, Path], watched: Any, tmp_path: Path) -> None:
    page = watched(pair[0], 1200, 900)
    choose_example(page, 1)
    page.click("button[role=tab]:has-text('Blind vote')")
    page.wait_for_selector("#mm-votes .mm-info >> text=No vote yet")
    for number, choice in enumerate(("first", "tie"), start=1):
        assert page.is_disabled(f"#mm-vote-{choice}")
        page.fill("#mm-vote-question textarea", "how many pictures")
        page.click("#mm-vote-ask")
        page.wait_for_selector(f"#mm-vote-{choice}:not([disabled])")
        said = page.inner_text("#mm-vote-answers")
        assert "Model A" in said
        assert "one" not in said.lower().split("model")[0]
        page.click(f"#mm-vote-{choice}")
        page.wait_for_selector("#mm-vote-notice >> text=Model A was")
        page.wait_for_selector(f"#mm-votes caption >> text={number} vote")
    with page.expect_download() as download:
        page.click("#mm-vote-export")
    download.value.save_as(tmp_path / "votes.jsonl")
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [vote["choice"] for vote in votes] == ["first", "tie"]
    assert all({vote["first"], vote["second"]} == {"one", "two"} for vote in votes)
    assert votes[0]["kind"] == "count"
    page.close()


def test_look_inside_and_browse_in_a_browser(pair: tuple[str, Path], watched: Any) -> None:
    page = watched(pair[0], 1200, 900)
    choose_example(page, 2)
    ask(page, "what colour is it")
    page.click("button[role=tab]:has-text('Look inside')")
    page.click("#mm-show")
    page.wait_for_selector("#mm-maps figure:nth-child(2) >> text=layer 4 of 4")
    page.click("#mm-show-answer")
    page.wait_for_selector("#mm-answer-maps figure >> text=all tokens")
    page.click("#mm-token input")
    page.click("ul[role=listbox] li >> nth=1")
    page.wait_for_selector("#mm-answer-maps figure >> text=1:")  # the map of that token alone
    write_run(pair[1].parent / "runs/later")  # finished after the page was opened
    page.click("button[role=tab]:has-text('Browse a run')")
    page.wait_for_timeout(1000)  # the runs are looked for
    page.click("#mm-run input")
    page.wait_for_selector("ul[role=listbox] li >> text=later")
    page.click("ul[role=listbox] li >> text=mine")
    page.wait_for_selector(".mm-card:nth-child(2)")
    assert page.locator(".mm-card").count() == 2  # where the two disagree
    page.click("#mm-to-chat")
    page.wait_for_function("document.querySelector('#mm-question textarea').value === '<q1>'")
    page.wait_for_selector("button[role=tab][aria-selected=true]:has-text('Chat')")
    ask(page, "what colour is it")
    page.close()


def test_the_main_path_needs_no_mouse(pair: tuple[str, Path], watched: Any) -> None:
    page = watched(pair[0], 1200, 900)
    reach(page, "button.thumbnail-item")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#mm-image img')?.naturalWidth > 0")
    reach(page, "#mm-question textarea")
    page.keyboard.type("what colour is it")
    page.keyboard.press("Enter")
    page.wait_for_selector(".mm-answer:nth-child(2).mm-done")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    reach(page, "#mm-clear")
    page.keyboard.press("Space")
    page.wait_for_selector(".mm-empty")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
def test_the_page_has_no_serious_finding_of_axe(pair: tuple[str, Path], watched: Any, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    page = watched(pair[0], width, 900, color_scheme=scheme)
    choose_example(page, 0)
    ask(page, "what colour is it")
    page.click("#mm-show", force=True) if page.is_visible("#mm-show") else None
    found = []
    for tab in ("Chat", "Blind vote", "Look inside", "Browse a run"):
        open_tab(page, tab)
        page.wait_for_timeout(300)  # the tab's underline slides
        for violation in axe.run(page).response["violations"]:
            if violation["impact"] in SERIOUS:
                found += [f"{tab}: {violation['id']} {node['target']} {node.get('failureSummary', '')}" for node in violation["nodes"]]
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
    page.close()
    assert not found, "\n".join(found)


def test_a_password_is_asked_before_anything_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(demo.PASSWORD, "open sesame")
    blocks = demo.build_page(ModelShelf([Scripted("a")]), votes=Votes(tmp_path / "votes.sqlite"), runs=tmp_path)
    try:
        url = demo.launch(blocks)
        assert httpx.get(f"{url}config").status_code == 401
        assert "mm-head" not in httpx.get(url).text
        with httpx.Client() as client:
            assert client.post(f"{url}login", data={"username": demo.USER, "password": "wrong"}).status_code == 400
            assert client.post(f"{url}login", data={"username": demo.USER, "password": "open sesame"}).status_code == 200
            assert client.get(f"{url}config").status_code == 200
    finally:
        blocks.close()


# ---- what the tests do with a page --------------------------------------------------------------------------------------------------------


def choose_example(page: Any, number: int) -> None:
    """Tap an example image and wait until it stands in the picker."""
    page.click(f"#mm-examples button.thumbnail-item >> nth={number}")
    page.wait_for_function("document.querySelector('#mm-image img')?.naturalWidth > 0")


def ask(page: Any, question: str) -> None:
    """Ask in the chat and wait for all answers."""
    page.fill("#mm-question textarea", question)
    page.click("#mm-ask-button")
    page.wait_for_function("document.querySelector('#mm-question textarea').value === ''")
    page.wait_for_selector(".mm-round:last-child .mm-answer:nth-child(2).mm-done")
    page.wait_for_selector("#mm-ask-button:not([disabled])")


def open_tab(page: Any, name: str) -> None:
    """Open a tab; on a phone those that do not fit are in a menu."""
    tab = page.locator(f"button[role=tab]:has-text('{name}'):visible")
    if not tab.count():
        page.click(".overflow-menu > button")
        tab = page.locator(f".overflow-dropdown button:has-text('{name}')")
    tab.first.click()


def reach(page: Any, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate(f"document.activeElement?.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"Tab never came to {selector}")
