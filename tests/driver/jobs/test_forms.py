"""Rows to requests and outputs to rows, in both forms."""

import json

import pytest

from shoal.driver.jobs.faults import Fault, RowError
from shoal.driver.jobs.forms.base import FORMS, make_form
from shoal.driver.jobs.json_text import dump
from shoal.driver.jobs.template import PromptTemplate
from shoal.driver.outputs import CompletionOutput, Logprob, RequestOutput

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def form(job):
    return lambda name, **fields: make_form(name, job("in.jsonl", **fields))


def line(url=CHAT, **body):
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **body}}


def output(*texts, logprobs=None):
    parts = [
        CompletionOutput(i, text, [7, 8], None if logprobs is None else -1.0, logprobs, "stop", None)
        for i, text in enumerate(texts)
    ]
    return RequestOutput("0", "in", [1, 2, 3], outputs=parts, num_cached_tokens=2)


def refusal(call, *arguments):
    with pytest.raises(RowError) as caught:
        call(*arguments)
    return caught.value.fault


def test_every_form_is_there(form):
    assert all(form(name).separate_errors in (True, False) for name in FORMS)


def test_plain_requests(form):
    plain = form("rows")
    assert plain.request({"prompt": "x", "sampling_params": {"n": 2}}).sampling == {"n": 2}
    assert plain.request({"prompt": "x", "sampling_params": '{"n": 3}'}).sampling == {"n": 3}
    assert plain.request({"prompt": [1, 2]}).prompt == [1, 2]
    assert plain.request({"messages": [{"role": "user", "name": None, "content": None}]}).messages == [
        {"role": "user", "content": None}
    ]
    assert plain.request({"prompt": "x", "model": "other"}).model == "other"
    assert refusal(plain.request, {"text": "x"}).code == "missing_column"
    assert refusal(plain.request, {"prompt": "x", "sampling_params": [1]}).stage == "parameters"
    assert refusal(plain.request, {"messages": "[1"}).code == "invalid_value"


def test_templates(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = form("rows", prompt_template="{{ a }} and {{ b|upper }}\n")
    assert made.request({"a": 1, "b": "x"}).prompt == "1 and X\n"
    fault = refusal(made.check, {"a": 1})
    assert (fault.code, fault.message) == ("missing_column", "prompt_template needs 'b'")
    path = tmp_path / "t.jinja"
    path.write_text("{{ a.b }}")
    asked = form("rows", prompt_template=str(path), as_chat=True).request({"a": {"b": "deep"}})
    assert asked.messages == [{"role": "user", "content": "deep"}]
    assert refusal(form("rows", prompt_template=str(path)).request, {"a": {}}).stage == "template"
    assert PromptTemplate("{{ x | default('none') }}").render({}) == "none"
    for text in ("{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"):
        assert refusal(PromptTemplate(text).render, {}).code == "template_error"
    for text, message in (("{% if %}", "prompt_template, line 1"), ("no/such/file", "neither Jinja text")):
        with pytest.raises(ValueError, match=message):
            PromptTemplate(text)


def test_plain_answers_keep_the_row(form):
    columns = {"id": "7", "prompt": "x", "label": [1]}
    row = form("rows").answer("7", columns, output("yes"))
    assert row == {
        "id": "7", "prompt": "x", "label": [1], "generated_text": "yes", "finish_reason": "stop", "stop_reason": None,
        "num_input_tokens": 3, "num_generated_tokens": 2, "num_cached_tokens": 2, "error": None,
    }  # fmt: skip
    chosen = form("rows", columns=["label"], token_ids=True)
    row = chosen.answer("7", columns, output("a", "b"))
    assert "prompt" not in row
    assert row["id"] == "7"
    assert (row["num_generated_tokens"], row["generated_tokens"], row["prompt_token_ids"]) == (4, [7, 8], [1, 2, 3])
    assert [one["text"] for one in row["completions"]] == ["a", "b"]
    assert form("rows").answer("f:1", {"prompt": "x"}, output("y"))["id"] == "f:1"
    assert refusal(chosen.check, {"prompt": "x"}).message == "the row has no 'label' (columns)"


def test_plain_failures(form):
    fault = Fault("code", "stage", "why")
    assert form("rows").failure("7", {"id": "7", "prompt": "x"}, fault) == {
        "id": "7", "prompt": "x", "generated_text": None, "error": {"code": "code", "stage": "stage", "message": "why"},
    }  # fmt: skip
    assert form("rows").failure("f:3", None, fault)["id"] == "f:3"


def test_openai_chat_requests(form):
    made = form("openai")
    asked = made.request(
        line(messages=[{"role": "user", "content": "x"}], max_completion_tokens=5, max_tokens=9, top_logprobs=2,
             logprobs=True, temperature=0, user="u", stream=False, response_format={"type": "text"}, tools=[{"f": 1}])
    )  # fmt: skip
    assert asked.sampling == {"max_tokens": 5, "logprobs": 2, "temperature": 0}
    assert (asked.fallback, asked.model, asked.chat) == ({"max_tokens": None}, "m", {"tools": [{"f": 1}]})


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"url": CHAT, "body": {}}, "missing_column"),
        ({"custom_id": "a", "url": CHAT}, "missing_column"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "invalid_url"),
        ({"custom_id": "a", "url": CHAT, "body": {}, "method": "GET"}, "invalid_method"),
        ({"custom_id": "a", "url": CHAT, "body": "x"}, "invalid_body"),
        (line(), "invalid_body"),
        (line(TEXT), "invalid_body"),
        (line(messages=[], temprature=1), "unknown_parameter"),
        (line(messages=[], stream=True), "unsupported_parameter"),
        (line(messages=[], response_format={"type": "json_object"}), "unsupported_parameter"),
        (line(messages=[], tool_choice="required"), "unsupported_parameter"),
        (line(messages=[], top_logprobs=3), "invalid_parameter"),
        (line(TEXT, prompt=["a", "b"]), "unsupported_parameter"),
        (line(TEXT, prompt="a", echo=True), "unsupported_parameter"),
    ],
)
def test_openai_refusals(form, columns, code):
    made = form("openai")

    def read(columns):
        made.row_id(columns)
        made.request(columns)

    assert refusal(read, columns).code == code


def test_openai_completion_requests(form):
    made = form("openai")
    assert made.request(line(TEXT, prompt=["a"])).prompt == "a"
    assert made.request(line(TEXT, prompt=[[1, 2]])).prompt == [1, 2]
    assert made.request(line(TEXT, prompt="a", logprobs=3)).sampling == {"logprobs": 3}


def test_openai_answers(form):
    made = form("openai")
    entry = {7: Logprob(-0.5, 3, "é"), 1: Logprob(-0.1, 1, "a"), 2: Logprob(-0.2, 2, "b")}
    asked = line(messages=[], logprobs=True, top_logprobs=2)
    row = made.answer("a", asked, output("hi", logprobs=[entry]))
    body = row["response"]["body"]
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("a", None, 200)
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["usage"]["total_tokens"] == 5
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["bytes"]) == ("é", [195, 169])
    assert [one["token"] for one in token["top_logprobs"]] == ["a", "b"]
    body = made.answer("a", line(TEXT, prompt="x", logprobs=2), output("y", logprobs=[entry]))["response"]["body"]
    assert body["choices"][0]["text"] == "y"
    assert body["choices"][0]["logprobs"]["tokens"] == ["é"]


def test_openai_failures(form):
    made = form("openai")
    refused = made.failure("a", line(), Fault("invalid_parameter", "parameters", "why"))
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["message"] == "why"
    lost = made.failure("f:1", None, Fault("invalid_json", "read", "why"))
    assert (lost["custom_id"], lost["response"], lost["error"]["code"]) == ("f:1", None, "invalid_json")


def test_lines_are_always_json():
    assert dump({"a": "é"}) == '{"a":"é"}'.encode()
    assert dump({"a": "\ud800"}) == b'{"a":"\\ud800"}'
    assert json.loads(dump({"a": [float("nan"), {"b": float("inf")}, 1.5]})) == {"a": [None, {"b": None}, 1.5]}
