"""The demo's other parts without a browser: saved conversations, the look inside, answers' attention, the browser of runs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llava_tiny import picture, tiny_llm, tiny_tower
from PIL import Image

from apps import demo_browse, share
from apps.chat_session import Answer, ChatSession, Limits, ModelShelf, Round
from apps.demo_desk import Desk
from apps.demo_inside import ALL, LAST, MEAN, Inside
from llm_stage.answer_attention import answer_attention
from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import build_llava
from mmkit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    llm, tokenizer = tiny_llm(tie=False)
    model, processor = build_llava(tiny_tower(), (llm, tokenizer))
    return ChatModel(model.eval(), processor, ChatFormat(processor.tokenizer, "own"), "tiny")


# ---- saved conversations ------------------------------------------------------------------------------------------------------------------


def conversation() -> list[Round]:
    red, blue = picture("red"), picture("blue")
    answers = [
        Answer("a", "one <b>", "done", 0.1, 0.5, 3),
        Answer("b", "", "failed", error="RuntimeError: </script><script>alert(1)</script>"),
    ]
    return [Round("what's <this>?", (red, blue), answers, 2), Round("and?", (red, blue), [Answer("a", "two", "stopped", 0.1, 0.2)])]


@pytest.mark.parametrize("kind", ["json", "html"])
def test_a_saved_conversation_loads_back_whole(kind: str, tmp_path: Path) -> None:
    rounds = conversation()
    document = share.to_document(rounds, ["a", "b"], [{"origin": "x"}, {}])
    path = tmp_path / f"chat.{kind}"
    path.write_text(share.to_html(document) if kind == "html" else json.dumps(document))
    loaded = share.read_document(path)
    assert loaded == rounds  # questions, answers, times, and images by what is in them
    assert len(document["images"]) == 2


def test_a_saved_page_holds_no_script_and_asks_for_nothing() -> None:
    page = share.to_html(share.to_document(conversation(), ["a<i>", "b"], [{"origin": "<script>"}, {}]))
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="mmkit-conversation">']
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "what&#x27;s &lt;this&gt;?" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "format"),
        ({"version": 9}, "version 9"),
        ({"images": ["data:image/png;base64,!!!"]}, "image 0"),
        ({"images": ["http://somewhere/x.png"]}, "image 0 is no PNG"),
        ({"rounds": [{"question": "?", "images": [7], "attempt": 0, "answers": []}]}, r"images \[7\]"),
        ({"rounds": [{"images": []}]}, "broken"),
        ({"rounds": 3}, "broken"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    document = {**share.to_document(conversation(), ["a"], [{}]), **change}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=said):
        share.read_document(path)
    path.write_text("hello")
    with pytest.raises(DataError, match=r"chat\.json holds no conversation"):
        share.read_document(path)


# ---- attention of an answer ---------------------------------------------------------------------------------------------------------------


def test_attention_of_an_answer_is_that_of_a_plain_forward_pass(chat: ChatModel) -> None:
    request, answer = ChatRequest([Turn("user", "what colour is it")], [picture("red"), picture("blue")]), "it is red"
    seen = answer_attention(chat, request, answer)
    said = chat.tokenizer(answer)["input_ids"]
    assert "".join(seen.tokens) == answer
    assert seen.shares.shape == (len(said), 2, 4, 2, 4, 4)  # tokens, layers, heads, images, patches
    prompt, images = chat.prompt(request)
    inputs = chat.inputs([[*prompt, *said]], [images])
    llm, entered = chat.model.model.language_model, []
    hook = llm.register_forward_pre_hook(lambda _, args, values: entered.append(values["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        chat.model(**inputs)
    hook.remove()
    llm.set_attn_implementation("eager")
    try:
        attention = llm(inputs_embeds=entered[0], output_attentions=True).attentions  # L of [1, A, S, S]
    finally:
        llm.set_attn_implementation("sdpa")
    places = (inputs["input_ids"][0] == chat.model.config.image_token_id).nonzero()[:, 0]
    token, layer, head, image = 1, 1, 2, 1
    wanted = attention[layer][0, head, len(prompt) - 1 + token, places[16:32]]
    assert torch.allclose(seen.shares[token, layer, head, image].flatten(), wanted, atol=1e-6)
    assert (seen.on_images > 0).all()
    assert (seen.on_images < 1).all()


def test_looking_changes_nothing_and_takes_no_answer_without_image(chat: ChatModel) -> None:
    request = ChatRequest([Turn("user", "what colour is it")], [picture("green")])
    before = chat.generate([request], max_new_tokens=8)
    answer_attention(chat, request, "it is green")
    assert chat.generate([request], max_new_tokens=8) == before
    assert chat.model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(DataError, match="no image"):
        answer_attention(chat, ChatRequest([Turn("user", "hello")]), "hello")
    with pytest.raises(DataError, match="no words"):
        answer_attention(chat, request, "  ")


# ---- look inside --------------------------------------------------------------------------------------------------------------------------


def request_of(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def test_the_look_inside_draws_encoders_answers_and_says_what_cannot_be(chat: ChatModel, tmp_path: Path) -> None:
    shelf = ModelShelf([chat])
    desk, path = Desk(shelf), tmp_path / "red.png"
    inside, me = Inside(desk, [("other", tiny_tower(3))]), request_of("me")
    picture("red").save(path)
    drawn = inside.encoder_maps(me, str(path), None, "tiny", "other", LAST, MEAN, "")
    assert drawn.count("<figure>") == 2
    assert "layer 4 of 4, mean of 2 heads" in drawn
    assert "head 2 of 2" in inside.encoder_maps(me, str(path), None, "tiny", "none", "1", "2", "")
    assert "layer 9 was asked for" in inside.encoder_maps(me, str(path), None, "tiny", "none", "9", MEAN, "")
    assert "no joint space" in inside.encoder_maps(me, str(path), None, "tiny", "none", LAST, MEAN, "a <b>cat")
    assert "no image" in inside.encoder_maps(me, None, None, "tiny", "none", LAST, MEAN, "")
    html, _ = inside.answer_maps(me, "tiny", ALL, MEAN, MEAN)
    assert "ask in the chat first" in html
    session = desk.session(me)
    session.load([Round("what?", (picture("red"),), [Answer("tiny", "it is red", "done")])])
    html, tokens = inside.answer_maps(me, "tiny", ALL, MEAN, MEAN)
    assert html.count("<figure>") == 1
    html, _ = inside.answer_maps(me, "tiny", tokens["choices"][2], "2", "4")
    assert "layer 2, head 4 of 4" in html
    assert "ask in the chat first" in inside.answer_maps(request_of("you"), "tiny", ALL, MEAN, MEAN)[0]  # another's answers are not shown


# ---- browsing runs ------------------------------------------------------------------------------------------------------------------------


def write_run(root: Path) -> None:
    """Two encoders on four questions: both right, one, the other, none."""
    right = {"clip": [1, 1, 0, 0], "uta": [1, 0, 1, 0]}
    (root / "images").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (20, 10), (60 * number, 0, 0)).save(root / f"images/{number}.png")
    for name, scores in right.items():
        folder = root / "eval" / name / "mini_vqa"
        folder.mkdir(parents=True)
        metric = {"value": 50.0, "ci95": [10.0, 90.0], "n": 4}
        summary = {"benchmark": "mini_vqa", "n": 4, "metrics": {"vqa_accuracy": metric}, "protocol": {"images": "../../../images"}}
        (folder / "summary.json").write_text(json.dumps(summary))
        kinds = ["count", "count", "colour", "colour"]
        rows = [
            {"question_id": n, "question": f"<q{n}>", "answer": f"{name}{n}", "image": f"{n}.png", "kind": kinds[n], "score": scores[n]}
            for n in range(4)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_browsed_by_kind_and_by_who_is_right(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/mine")
    browser = demo_browse.Browser(tmp_path / "runs")
    assert browser.folders() == ["mine"]
    benchmarks, kinds, who, _, _ = browser.choose_run("mine")
    assert benchmarks["choices"] == ["mini_vqa"]
    assert kinds["choices"] == ["every kind", "count", "colour"]
    assert who["value"] == "they disagree"
    rows = demo_browse.rows_of(browser.run("mine"), "mini_vqa")

    def names(kind: str, who: str) -> list[str]:
        return [row.name for row in demo_browse.kept(rows, kind, who)]

    assert names("every kind", "all") == ["0", "1", "2", "3"]
    assert names("every kind", "they disagree") == ["1", "2"]
    assert names("count", "they disagree") == ["1"]
    assert names("every kind", "only right: uta") == ["2"]
    assert names("every kind", "all right") == ["0"]
    assert names("colour", "all wrong") == ["3"]
    html, choice, page = browser.show("mine", "mini_vqa", "every kind", "all", 99)
    assert html.count('<article class="mm-card">') == 4
    assert "&lt;q0&gt;" in html
    assert page == 1
    image, question, _, _ = browser.to_chat("mine", "mini_vqa", choice["choices"][2][1])
    assert question == "<q2>"
    assert image.getpixel((0, 0)) == (120, 0, 0)


def test_runs_are_looked_for_whenever_the_tab_is_opened(tmp_path: Path) -> None:
    browser = demo_browse.Browser(tmp_path / "runs")
    choice, notice = browser.look(None)
    assert choice["choices"] == []
    assert "No evaluations in runs/ yet" in notice
    write_run(tmp_path / "runs" / "mine")
    assert browser.look(None)[0]["choices"] == ["mine"]
    assert browser.look("mine")[0]["value"] == "mine"
    assert browser.look("gone") == (browser.look(None)[0], "")


@pytest.mark.parametrize("name", ["..", "../outside", "/etc", "", "."])
def test_nothing_outside_of_the_runs_is_opened(name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "outside")
    (tmp_path / "runs").mkdir()
    browser = demo_browse.Browser(tmp_path / "runs")
    with pytest.raises(DataError, match="no run folder"):
        browser.run(name)
    assert "no run folder" in browser.choose_run(name)[-1]


def test_one_persons_session_is_not_anothers(chat: ChatModel) -> None:
    desk = Desk(ModelShelf([chat]))
    first, second = desk.session(request_of("a")), desk.session(request_of("b"))
    assert first is desk.session(request_of("a"))
    list(first.ask("hello", (), Limits(max_new_tokens=2)))
    assert isinstance(second, ChatSession)
    assert second.rounds == []
    left: list[str] = []
    desk.leavers.append(lambda request: left.append(str(request.session_hash)))
    desk.forget(request_of("a"))
    assert left == ["a"]
    assert desk.session(request_of("a")).rounds == []


def test_a_layer_or_head_that_is_none_is_named(chat: ChatModel) -> None:
    from apps.demo_inside import chosen_head

    with pytest.raises(ConfigError, match="heads 1 to 4"):
        chosen_head(torch.ones(4, 2, 2), "5")
