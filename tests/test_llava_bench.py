"""LLaVA-Bench: messages, scores and sums of the authors; a judge over real HTTP that does everything wrong; nothing counted that was not judged."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from llava_tiny import picture

from llm_stage import eval_llava_bench, eval_vqa
from llm_stage.chat_format import Turn
from llm_stage.endpoint import Endpoint, EndpointChat, EndpointError
from llm_stage.eval_llava_bench import LlavaBenchConfig, read_cases, summarise
from llm_stage.generate import ChatRequest
from llm_stage.judge import SYSTEM, Case, Judge, MockJudge, message, parse_scores, same_family, self_test
from mmkit.errors import ConfigError, DataError
from mmkit.records import Records, read_jsonl

GOLDEN = Path(__file__).parent / "golden" / "llava_bench"
CASES = json.loads((GOLDEN / "parser_cases.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if case["required"] != "any"], ids=lambda case: repr(case["text"])[:30])
def test_scores_are_read_where_there_are_two_and_nowhere_else(case: dict[str, Any]) -> None:
    assert parse_scores(case["text"]) == (tuple(map(float, case["required"])) if case["required"] else None)


def test_a_message_is_the_authors_to_the_byte() -> None:
    golden = json.loads((GOLDEN / "judge_messages.json").read_text())
    questions = {row["question_id"]: row for row in read_jsonl(GOLDEN / "questions.jsonl")}
    cases = read_cases(settings(), questions)
    for case in golden["cases"]:
        text = message(Case(**{**cases[case["question_id"]].__dict__, "candidate": case["candidate"]}))
        assert text == case["message"]
        assert hashlib.sha256(text.encode()).hexdigest() == case["sha256_utf8"]
    assert golden["system"] == SYSTEM


def settings(**more: Any) -> LlavaBenchConfig:
    names = {"questions": "questions.jsonl", "reference": "reference.jsonl", "context": "context.jsonl", "rules": "rule.json"}
    return LlavaBenchConfig(**{name: str(GOLDEN / file) for name, file in names.items()}, **more)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_failures_are_left_out_and_counted(number: int) -> None:
    golden = json.loads((GOLDEN / "aggregation_cases.json").read_text())["cases"][number]
    questions = {row["question_id"]: {"category": row["category"], "image": str(row["question_id"])} for row in golden["reviews"]}
    reviews = {row["question_id"]: [{"scores": row["tuple"] if min(row["tuple"]) >= 0 else None}] for row in golden["reviews"]}
    found = summarise(reviews, questions, LlavaBenchConfig(), "m", "j", None, None)
    for name, row in golden["required_failures_excluded"].items():
        label = "relative" if name == "all" else f"relative/{name}"
        assert found["metrics"][label]["value"] == pytest.approx(row["relative"], abs=1e-9)
        means = found["means"][name]
        assert (means["judged"], means["of"], means["failed"]) == (row["judged"], row["total"], row["failed"])
        assert means["reference"] == pytest.approx(row["reference_mean"], abs=1e-9)
        assert means["candidate"] == pytest.approx(row["candidate_mean"], abs=1e-9)
    share = golden["required_failures_excluded"]["all"]
    assert found["valid"] == (share["failed"] / share["total"] <= 0.05)


@pytest.mark.parametrize("name", ["review_alpaca-13b_vicuna-13b", "review_bard_vicuna-13b"])
def test_recorded_reviews_give_the_ratio_of_means(name: str, tmp_path: Path) -> None:
    words = ["--replay", str(GOLDEN / "reviews" / f"{name}.jsonl"), "--questions", str(GOLDEN / "reviews" / "question.jsonl")]
    out = eval_llava_bench.main([*words, "--out", str(tmp_path / "out")])
    found, golden = json.loads((out / "summary.json").read_text()), json.loads((GOLDEN / "expected_reviews.json").read_text())[name]
    parsed = golden["from_parsed_text_only"]
    assert found["n"] == parsed["n"]
    assert found["metrics"]["relative"]["value"] == pytest.approx(parsed["relative"], abs=1e-9)
    assert found["missing"] == len(golden["first_line_not_parsable_question_ids"])


# ---- a judge over real HTTP ----------------------------------------------------------------------------------------------------------


class Server:
    """An endpoint on loopback. `behave` gives what happens to a request: ("say", text), ("status", code), ("cut",), ("stall",), ..."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.behave: Any = lambda body, count: ("say", "8 6\nfine")
        self.counts: Counter[str] = Counter()
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                words = json.dumps(body["messages"][-1])
                with lock:
                    server.seen.append(body)
                    server.keys.append(self.headers.get("authorization"))
                    server.counts[words] += 1
                    count = server.counts[words]
                kind, *more = server.behave(body, count)
                if kind == "cut":
                    self.connection.close()
                    return
                if kind == "stall":
                    time.sleep(1.5)
                content: Any = {"model": "a-judge", "usage": {"prompt_tokens": 100, "completion_tokens": 10}, "choices": []}
                if kind == "say":
                    content["choices"] = [{"message": {"content": more[0]}, "finish_reason": more[1] if len(more) > 1 else "stop"}]
                data = more[0].encode() if kind == "raw" else json.dumps(content).encode()
                try:
                    self.send_response(more[0] if kind == "status" else 200)
                    if kind == "status" and more[0] == 429:
                        self.send_header("retry-after", "0.05")
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has gone
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    rows = [{"question_id": row["question_id"], "text": f"answer {row['question_id']}"} for row in read_jsonl(GOLDEN / "questions.jsonl")]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(server: Server, answers: Path, out: Path, *more: str) -> list[str]:
    files = {name: getattr(settings(), name) for name in ("questions", "reference", "context", "rules")}
    given = {
        **files,
        "judge": f"judge@{server.url}",
        "answers": answers,
        "out": out,
        "self_test": 0,
        "backoff": 0.01,
        "timeout": 1,
        "tries": 3,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


def number_of(body: dict[str, Any]) -> int:
    """The question's number, read from the candidate's answer inside the message."""
    return int(re.findall(r"answer (\d+)", body["messages"][-1]["content"])[0])


def test_a_judge_that_does_everything_wrong_is_survived_and_counted(server: Server, answers: Path, tmp_path: Path) -> None:
    numbers = [row["question_id"] for row in read_jsonl(GOLDEN / "questions.jsonl")]
    faults = {
        numbers[0]: ("status", 500), numbers[1]: ("status", 429), numbers[2]: ("cut",), numbers[3]: ("stall",), numbers[4]: ("raw", "no json"),
        numbers[5]: ("say", "I cannot rate these."), numbers[6]: ("none",), numbers[7]: ("say", "", "content_filter"),
    }  # fmt: skip
    for_ever = {numbers[0], numbers[5], numbers[7]}

    def behave(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        number = number_of(body)
        if number in faults and (count == 1 or number in for_ever):
            return faults[number]
        return ("say", "8 6\nfine")

    server.behave = behave
    out = eval_llava_bench.main(words(server, answers, tmp_path / "out"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["missing"] == 3
    assert not summary["valid"]
    assert summary["metrics"]["relative"]["value"] == pytest.approx(75.0)
    failures = {row["question_id"]: row["failure"] for row in read_jsonl(out / "reviews.jsonl") if not row["scores"]}
    assert set(failures) == for_ever
    assert "HTTP 500" in failures[numbers[0]]
    assert failures[numbers[5]].startswith("no two scores")
    assert failures[numbers[7]] == "refused by a filter"
    asked = len(server.seen)
    server.behave = lambda body, count: ("say", "8 6\nfine")
    again = json.loads((eval_llava_bench.main(words(server, answers, tmp_path / "out")) / "summary.json").read_text())
    assert again["missing"] == 0
    assert again["valid"]
    assert sorted(number_of(body) for body in server.seen[asked:]) == sorted(for_ever)  # what is missing, and nothing else


def test_a_second_start_asks_nothing_that_is_known(server: Server, answers: Path, tmp_path: Path) -> None:
    eval_llava_bench.main(words(server, answers, tmp_path / "out", "--both_orders", "true"))
    asked = len(server.seen)
    assert asked == 2 * len(read_jsonl(GOLDEN / "questions.jsonl"))
    eval_llava_bench.main(words(server, answers, tmp_path / "out", "--both_orders", "true"))
    assert len(server.seen) == asked


def test_a_taste_for_the_first_place_is_seen_and_cancels_out(server: Server, answers: Path, tmp_path: Path) -> None:
    server.behave = lambda body, count: ("say", "9 5")  # whoever stands first
    one = json.loads((eval_llava_bench.main(words(server, answers, tmp_path / "one")) / "summary.json").read_text())
    assert one["metrics"]["relative"]["value"] == pytest.approx(100 * 5 / 9)
    both = eval_llava_bench.main(words(server, answers, tmp_path / "both", "--both_orders", "true"))
    found = json.loads((both / "summary.json").read_text())
    assert found["metrics"]["relative"]["value"] == pytest.approx(100.0)
    assert found["order_consistency"] == 0.0


def test_a_judge_is_tested_before_it_is_trusted(server: Server, answers: Path, tmp_path: Path) -> None:
    server.behave = lambda body, count: ("say", "10 10")
    out = eval_llava_bench.main(words(server, answers, tmp_path / "out", "--self_test", "4"))
    found = json.loads((out / "summary.json").read_text())
    assert found["self_test"] == {"accuracy": 0.0, "ties": 100.0, "consistent": 100.0, "judged": 8, "of": 8, "trusted": False}
    assert any("failed its self-test" in warning for warning in found["warnings"])

    class Right:
        model = "right"

        def complete(self, messages: Any, **_: Any) -> Any:
            first = messages[-1]["content"].split("[Assistant 1]")[1]
            return MockJudge().complete(messages, max_tokens=1).__class__("9 2" if first.strip().startswith("good") else "2 9", "right")

    cases = [Case(number, "what", "a cat", "good", "bad", "rate") for number in range(3)]
    with Records(tmp_path / "cache.jsonl", key="key") as cache:
        assert self_test(Judge(Right(), cache), cases)["trusted"]


def test_a_key_is_sent_and_never_written(server: Server, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-4711")
    out = eval_llava_bench.main(words(server, answers, tmp_path / "out", "--key_variable", "JUDGE_KEY", "--price", "[2.0, 8.0]"))
    assert set(server.keys) == {"Bearer secret-4711"}
    assert not any("secret-4711" in path.read_text() for path in out.rglob("*") if path.is_file())
    calls = len(server.seen)
    assert json.loads((out / "summary.json").read_text())["usage"] == {
        "calls": calls, "prompt_tokens": 100 * calls, "completion_tokens": 10 * calls, "cost": pytest.approx(calls * 0.00028, abs=1e-4),
    }  # fmt: skip
    server.behave = lambda body, count: ("status", 401)
    with pytest.raises(ConfigError, match="the environment variable JUDGE_KEY holds a key that it does not take"):
        eval_llava_bench.main(words(server, answers, tmp_path / "no", "--key_variable", "JUDGE_KEY"))


def test_a_refusal_is_taken_for_one_and_not_asked_for_again(server: Server) -> None:
    refusal = {"choices": [{"message": {"content": None, "refusal": "I will not"}, "finish_reason": "stop"}]}
    server.behave = lambda body, count: ("raw", json.dumps(refusal))
    reply = Endpoint.parse(f"m@{server.url}").complete([{"role": "user", "content": "hello"}], max_tokens=1)
    assert (reply.text, reply.finish_reason, len(server.seen)) == ("I will not", "content_filter", 1)


def test_a_judge_that_is_down_is_given_up_and_its_verdicts_are_kept(server: Server, answers: Path, tmp_path: Path) -> None:
    numbers = [row["question_id"] for row in read_jsonl(GOLDEN / "questions.jsonl")]
    server.behave = lambda body, count: ("say", "8 6") if number_of(body) in numbers[:3] else ("status", 500)
    with pytest.raises(EndpointError, match="5 questions in a row had no answer; what was judged is kept"):
        eval_llava_bench.main(words(server, answers, tmp_path / "out", "--workers", "1"))
    server.behave = lambda body, count: ("say", "8 6")
    asked = len(server.seen)
    eval_llava_bench.main(words(server, answers, tmp_path / "out", "--workers", "1"))
    assert {number_of(body) for body in server.seen[asked:]} == set(numbers[3:])


def test_an_address_with_a_key_in_it_is_refused_without_repeating_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="holds a user, a key or a query") as caught:
        Endpoint.parse("m@https://user:secret-4711@host/v1")
    assert "secret-4711" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-4711")
    server.behave = lambda body, count: ("status", 400)
    with pytest.raises(EndpointError, match="refused the request") as refused:
        Endpoint.parse(f"m@{server.url}").complete([{"role": "user", "content": "secret-4711"}], max_tokens=1)
    assert "secret-4711" not in str(refused.value)


def test_families_are_named() -> None:
    assert same_family("Qwen3-32B-Instruct", "llava-qwen2.5-7b") == "qwen"
    assert same_family("llama-3.1-70b", "lmsys/vicuna-7b-v1.5") == "llama"
    assert same_family("gpt-4-0314", "vicuna-7b") == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge", "nowhere"], "'nowhere' is no endpoint: MODEL@URL is right"),
        (["--rules="], "--rules is missing"),
        (["--answers="], "whose answers"),
        (["--context", str(GOLDEN / "reference.jsonl")], "has no context in"),
        (["--questions", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_bad_input_is_named(server: Server, answers: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        eval_llava_bench.main(words(server, answers, tmp_path / "out", *more))
    assert not server.seen


def test_an_address_without_an_endpoint_is_said_at_once(server: Server) -> None:
    server.behave = lambda body, count: ("status", 404)
    with pytest.raises(ConfigError, match="is not there, or knows no model 'm'"):
        Endpoint.parse(f"m@{server.url}").complete([{"role": "user", "content": "hello"}], max_tokens=1)
    assert len(server.seen) == 1
    with pytest.raises(EndpointError, match=r"gave no answer in 2 tries .* ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "m", tries=2, backoff=0.01).complete([{"role": "user", "content": "hello"}], max_tokens=1)


# ---- models behind an endpoint -------------------------------------------------------------------------------------------------------


def test_a_model_behind_an_endpoint_is_asked_with_its_pictures(server: Server, tmp_path: Path) -> None:
    server.behave = lambda body, count: ("say", f"{sum(part['type'] == 'image_url' for part in body['messages'][-1]['content'])} pictures ")
    chat = EndpointChat(Endpoint.parse(f"m@{server.url}"))
    requests = [
        ChatRequest([Turn("user", "<image> or <image>")], [picture("red"), picture("blue")]),
        ChatRequest([Turn("user", "what")], [picture("red")]),
    ]
    assert chat.generate(requests, 8) == ["2 pictures", "1 pictures"]
    assert list(chat.stream(requests[0], 8)) == ["2 pictures"]
    kinds = [part["type"] for body in server.seen for part in body["messages"][-1]["content"]]
    assert sorted(kinds) == ["image_url"] * 5 + ["text"] * 3
    assert server.seen[0]["temperature"] == 0
    with pytest.raises(DataError, match="request 0: more marks <image> than pictures"):
        chat.generate([ChatRequest([Turn("user", "<image> or <image>")], [picture("red")])], 8)


def test_questions_are_asked_of_an_endpoint(server: Server, tmp_path: Path) -> None:
    server.behave = lambda body, count: ("say", "red")
    picture("red").save(tmp_path / "0.png")
    (tmp_path / "q.json").write_text(json.dumps({"questions": [{"question_id": 1, "image": "0.png", "question": "what colour"}]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "red"}] * 10}]}))
    files = ["--questions", str(tmp_path / "q.json"), "--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path)]
    out = eval_vqa.main(["--model", f"m@{server.url}", *files, "--out", str(tmp_path / "out")])
    assert json.loads((out / "summary.json").read_text())["metrics"]["vqa_accuracy"]["value"] == 100.0
