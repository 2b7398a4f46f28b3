"""Endpoints, contestants behind them and the judge: what fails is asked again, counted and left out."""

import json

import pytest

from evaluation.dungeons import CHAT_REQUEST
from evaluation.endpoint import FAILURES_THAT_END_IT, Endpoint, EndpointError
from evaluation.judge import Verdict, bradley_terry, compare_blind, judge_texts, parse_verdict, rate
from evaluation.writers import Written, keep, kept, write_remotely
from tests.endpoint_server import SILENCE, Raw, Server, prefers_long

CUT_SHORT = Raw(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices"')
NOT_HTTP = Raw(b"hello there\r\n\r\n")
BAD_CHUNK = Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")


def endpoint_at(server, **settings):
    return Endpoint(server.url, "m", **{"first_pause_seconds": 0.01, **settings})


def test_an_endpoint_that_is_overrun_and_confused_is_asked_again_and_all_is_counted():
    """An answer cut short or not in HTTP once ended the whole evaluation, with all texts lost."""
    busy, nonsense = (429, {"Retry-After": "0.05"}), b"<html>oops"
    confused = (nonsense, b'{"choices": []}', b"[]", b"\xff\xfe", CUT_SHORT, NOT_HTTP, BAD_CHUNK)
    with Server(busy, *confused, (503, {}), "   ", Raw(b""), "a vaulted hall") as server:
        endpoint = endpoint_at(server, attempts=12)
        assert endpoint.complete("Describe it.", max_tokens=20, top_p=0.9) == "a vaulted hall"
    (lost,) = (reason for reason in endpoint.retries if reason.startswith("no connection"))
    assert endpoint.retries == {
        "status 429": 1,
        "malformed answer": len(confused),
        "status 503": 1,
        "empty answer": 1,
        lost: 1,
    }
    path, body = server.asked[-1]
    assert path == "/v1/chat/completions" and body["messages"][0]["content"] == "Describe it."
    assert body["top_p"] == 0.9


def test_an_endpoint_that_stays_silent_is_asked_again_and_then_left():
    with Server(SILENCE) as server:
        endpoint = endpoint_at(server, timeout_seconds=0.2, attempts=3)
        with pytest.raises(EndpointError, match=r"3 attempts; the last: no answer within 0.2 s") as caught:
            endpoint.complete("Describe it.", max_tokens=20)
    assert endpoint.retries == {"no answer within 0.2 s": 2}
    assert caught.value.reason == "no answer within 0.2 s"


def test_a_malformed_answer_stands_in_its_place_when_tries_are_over():
    with Server(CUT_SHORT) as server:
        (answer,) = endpoint_at(server, attempts=2).complete_all(["x"], max_tokens=3)
    assert isinstance(answer, EndpointError) and answer.reason == "malformed answer"


def test_what_fails_for_good_stands_in_its_place_and_a_refusal_is_not_repeated():
    with Server(lambda body: (400, {}) if "secret" in body["prompt"] else "fine") as server:
        answers = endpoint_at(server, chat=False).complete_all(["hello", "secret", "again"], max_tokens=5)
    assert answers[0] == answers[2] == "fine"
    assert isinstance(answers[1], EndpointError) and "status 400" in str(answers[1])
    assert len(server.asked) == 3 and server.asked[0][0] == "/v1/completions"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_is_not_tried_with_every_prompt(status):
    with Server(lambda body: (status, {})) as server:
        endpoint = endpoint_at(server)
        answers = endpoint.complete_all(["x"] * 50, max_tokens=5, concurrency=2)
    assert {answer.reason for answer in answers} == {f"status {status}"} and endpoint.given_up
    assert len(server.asked) <= 3  # those under way when the first refusal came


def test_an_endpoint_that_answers_nothing_more_is_given_up():
    """Each prompt once took its own half a minute of pauses, without a word."""
    with Server("x") as server:
        url = server.url
    endpoint = Endpoint(url, "m", attempts=2, first_pause_seconds=0.01)
    answers = endpoint.complete_all(["x"] * 50, max_tokens=1, concurrency=1)
    assert len(answers) == 50 and all("no connection" in answer.reason for answer in answers)
    assert endpoint.retries.total() == FAILURES_THAT_END_IT


def test_failures_between_answers_do_not_end_it():
    with Server(lambda body: (400, {}) if int(body["prompt"]) % 8 else "fine") as server:
        endpoint = endpoint_at(server, chat=False)
        answers = endpoint.complete_all([str(n) for n in range(40)], max_tokens=1, concurrency=1)
    assert answers.count("fine") == 5 and endpoint.given_up is None and len(server.asked) == 40


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:8000/v1", "http://127.0.0.1:port/v1"])
def test_what_is_no_address_is_said_at_once(url):
    endpoint = Endpoint(url, "m")
    with pytest.raises(EndpointError, match="is no http"):
        endpoint.complete("x", max_tokens=1)
    assert not endpoint.retries


# Contestants

SAMPLING = {"max_tokens": 5, "temperature": 0.9, "top_p": 0.95, "seed": 0}


def test_what_was_not_answered_is_no_text_and_alone_is_asked_for_again(tmp_path, capsys):
    """It once became an empty text, which the judge then saw lose."""
    texts_file = tmp_path / "out" / "texts.jsonl"
    with Server(lambda body: (400, {}) if "well" in body["prompt"] else "A hall.") as server:
        written = write_remotely(endpoint_at(server, chat=False), ["hall", "well"], SAMPLING, texts_file)
        assert written.texts == ["A hall.", None] and "1 of 2 were not answered" in capsys.readouterr().out
        assert all(server.asked[0][1][name] == value for name, value in SAMPLING.items())
        server.answers = ["A well."]
        written = write_remotely(endpoint_at(server, chat=False), ["hall", "well"], SAMPLING, texts_file)
        assert written.texts == ["A hall.", "A well."] and len(server.asked) == 3
        write_remotely(endpoint_at(server, chat=False), ["hall", "well"], SAMPLING, texts_file)
        assert len(server.asked) == 3
        write_remotely(endpoint_at(server, chat=False), ["hall"], {**SAMPLING, "seed": 1}, texts_file)
        assert len(server.asked) == 4


def test_a_chat_model_is_told_what_the_prompt_wants(tmp_path):
    with Server("A dry well.") as server:
        write_remotely(endpoint_at(server), ["Place: well\nDescription:"], SAMPLING, tmp_path / "t.jsonl")
    told = server.asked[0][1]["messages"][0]["content"]
    assert told == CHAT_REQUEST.format(prompt="Place: well\nDescription:")
    assert told.startswith("Write the description") and told.endswith("Place: well\nDescription:")


def test_a_contestant_that_answers_nothing_is_an_error(tmp_path):
    with (
        Server((400, {})) as server,
        pytest.raises(EndpointError, match=r"m answered none of 2 prompts.*status 400"),
    ):
        write_remotely(endpoint_at(server), ["a", "b"], SAMPLING, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


def test_a_line_cut_short_is_passed_over_and_the_newest_texts_count(tmp_path):
    path, asked = tmp_path / "texts.jsonl", {"writer": "a"}
    assert kept(path, asked) is None
    for text in ("first", "second"):
        with path.open("a") as file:
            file.write('{"asked": {"writer": "a"}, "te')
        keep(path, asked, Written([text], {"words": 1}))
    found = kept(path, asked)
    assert found is not None and found.texts == ["second"] and found.numbers == {"words": 1}
    assert kept(path, {"writer": "b"}) is None


# The judge


@pytest.mark.parametrize(
    ("answer", "score"),
    [("1", 1.0), ("Text 2.", 0.0), ("Tie!", 0.5), ("1 or 2", None), ("the first", None), ("12", None)],
)
def test_a_verdict_is_one_word_or_none(answer, score):
    assert parse_verdict(answer) == score


def test_every_pair_is_read_in_both_orders_and_the_better_writer_is_rated_higher():
    texts = {"short": ["a", "b"], "long": ["a long text", "another one"], "longest": ["x" * 40, "y" * 40]}
    with Server(prefers_long) as server:
        verdicts = compare_blind(endpoint_at(server), ["q1", "q2"], texts)
    assert len(verdicts) == len(server.asked) == 2 * 3 * 2
    assert {(v.first, v.second) for v in verdicts} >= {("short", "long"), ("long", "short")}
    for verdict in verdicts:  # whose text stood first is whose score it is
        first, second = texts[verdict.first][verdict.request], texts[verdict.second][verdict.request]
        assert verdict.score == (1.0 if len(first) > len(second) else 0.0)
    asked = [body["messages"][0]["content"] for _, body in server.asked]
    assert not any("longest" in prompt for prompt in asked)  # blind: no writer's name reaches the judge
    assert all("top_p" not in body for _, body in server.asked)
    ratings = rate(verdicts)
    assert ratings["short"].value < ratings["long"].value < ratings["longest"].value
    assert all(rating.low <= rating.value <= rating.high for rating in ratings.values())


def test_a_judge_that_always_says_1_rates_all_alike():
    with Server("1") as server:
        verdicts = compare_blind(endpoint_at(server), ["q"] * 3, {"a": ["x"] * 3, "b": ["y"] * 3})
    for rating in rate(verdicts).values():
        assert rating.value == pytest.approx(0.0, abs=1e-9)


def test_a_judge_that_leans_to_the_first_still_finds_the_better_one():
    """It calls near things for the first; read in both orders, that is a tie."""

    def leans(body):
        prompt = body["messages"][0]["content"]
        first, rest = prompt.split("Text 1:\n")[1].split("\n\nText 2:\n")
        return "1" if len(first) + 10 > len(rest.split("\n\nWhich text")[0]) else "2"

    texts = {"a": ["x" * 5] * 4, "near": ["y" * 9] * 4, "far": ["z" * 50] * 4}
    with Server(leans) as server:
        ratings = rate(compare_blind(endpoint_at(server), ["q"] * 4, texts))
    assert ratings["a"].value == pytest.approx(ratings["near"].value, abs=1e-6)
    assert ratings["far"].value > ratings["near"].value + 100


def test_nonsense_is_asked_again_and_stays_visible_as_unusable():
    with Server("Both are lovely.") as server:
        verdicts = compare_blind(endpoint_at(server), ["q"], {"a": ["x"], "b": ["y"]}, attempts=2)
    assert [verdict.score for verdict in verdicts] == [None, None] and len(server.asked) == 4
    assert {verdict.problem for verdict in verdicts} == {"an answer that is none of 1, 2 and tie"}
    with pytest.raises(ValueError, match="none of the judge's 2 answers"):
        rate(verdicts)


def test_a_judge_that_refuses_is_asked_once_and_says_why(capsys):
    """A wrong key once sent every game three times and printed only how many were unusable."""
    with Server((401, {})) as server:
        judge = endpoint_at(server)
        ratings, report = judge_texts(judge, ["q"] * 5, {"a": ["x"] * 5, "b": ["y"] * 5})
    assert ratings == {} and report["judge"]["unusable"] == {"status 401": 10}
    assert len(server.asked) <= 8  # so many are asked at a time
    printed = capsys.readouterr().out
    assert "10 without a verdict: status 401" in printed and "given up: " in printed
    json.dumps(report)


def test_a_game_for_want_of_a_text_is_left_out_and_counted(capsys):
    with Server(prefers_long) as server:
        texts = {"a": ["long text", None, "x"], "b": ["short", "text", ""]}
        ratings, report = judge_texts(endpoint_at(server), ["q"] * 3, texts)
    assert sorted({v["request"] for v in report["verdicts"]}) == [0, 2] and len(server.asked) == 4
    assert report["judge"]["left_out"] == 2 and ratings["a"].value > ratings["b"].value
    assert "2 more for want of a text" in capsys.readouterr().out


def test_ratings_recover_the_odds_that_made_the_games():
    """Ten to one is 400 points; one virtual tie a pair pulls that in by under 1% at 1,100 games."""
    games = [Verdict(n, "a", "b", 1.0) for n in range(1000)] + [Verdict(n, "b", "a", 1.0) for n in range(100)]
    ratings = bradley_terry(["a", "b"], games)
    assert ratings["a"] - ratings["b"] == pytest.approx(400, rel=0.01)
