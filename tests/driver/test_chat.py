"""Conversations to prompts."""

import pytest
import transformers
from tokenizers import Tokenizer, models

from shoal.driver.chat import ChatRenderer, ChatTemplateError, check_conversation, split_conversations

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}({{ part.text }}){% endfor %}{% endfor %}"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer():
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    made.chat_template = PLAIN
    return made


def test_one_or_many():
    assert len(split_conversations(USER)) == 1
    assert len(split_conversations([USER, USER])) == 2
    assert len(split_conversations([])) == 0
    for wrong in ("hi", {"role": "user"}, 5):
        with pytest.raises(TypeError, match="list of messages"):
            split_conversations(wrong)


@pytest.mark.parametrize("wrong", ["hi", 5, [5], ["hi"], [{"content": "no role"}]])
def test_what_is_no_conversation(wrong):
    with pytest.raises(TypeError, match=r"A conversation should be|A message should be"):
        check_conversation(wrong)


def test_rendering(tokenizer):
    assert ChatRenderer(tokenizer)(USER).text == "[user]hi</s>[assistant]"
    assert ChatRenderer(tokenizer, add_generation_prompt=False)(USER).text == "[user]hi</s>"


def test_continue_final_message(tokenizer):
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    renderer = ChatRenderer(tokenizer, add_generation_prompt=False, continue_final_message=True)
    assert renderer(messages).text == "[user]hi</s>[assistant]Well"
    with pytest.raises(ValueError, match="not compatible"):
        ChatRenderer(tokenizer, continue_final_message=True)(messages)


def test_text_parts_are_joined(tokenizer):
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]}
    assert ChatRenderer(tokenizer)([message]).text == "[user]a\nb\nc</s>[assistant]"
    assert ChatRenderer(tokenizer, PARTS)([message]).text == "[user](a)(b)(c)"
    assert ChatRenderer(tokenizer, PARTS)(USER).text == "[user](hi)"
    assert ChatRenderer(tokenizer, "{{ messages[0].content[0].text }}", "openai")(USER).text == "hi"
    assert ChatRenderer(tokenizer, "{{ messages[0].content }}", "string")([message]).text == "a\nb\nc"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            ValueError,
            "Unsupported chat content part type: 'image_url'",
        ),
        ([{"type": "text"}], TypeError, "should have a 'text' string"),
        ([5], TypeError, "content part"),
        (5, TypeError, "content should be a string or a list of parts"),
    ],
)
def test_other_parts_are_refused(tokenizer, content, error, message):
    with pytest.raises(error, match=message):
        ChatRenderer(tokenizer)([{"role": "user", "content": content}])


def test_no_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="default chat template is no longer allowed"):
        ChatRenderer(tokenizer)
    assert ChatRenderer(tokenizer, PLAIN)(USER).text == "[user]hi</s>[assistant]"


def test_template_from_a_file_or_a_name(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("<{{ messages[0]['content'] }}>")
    assert ChatRenderer(tokenizer, str(path), allowed_folder=str(tmp_path))(USER).text == "<hi>"
    with pytest.raises(ValueError, match=r"lies outside of .* name its folder in allowed_local_path"):
        ChatRenderer(tokenizer, str(path))
    with pytest.raises(ValueError, match=r"neither Jinja text.*nor a file"):
        ChatRenderer(tokenizer, str(tmp_path / "missing.jinja"))
    tokenizer.chat_template = {"default": PLAIN, "short": "{{ messages[0]['content'] }}"}
    assert ChatRenderer(tokenizer, "short")(USER).text == "hi"
    assert ChatRenderer(tokenizer)(USER).text == "[user]hi</s>[assistant]"


def test_what_a_template_raises_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatRenderer(tokenizer, "{{ raise_exception('roles must alternate') }}")(USER)
    with pytest.raises(ValueError, match="can only concatenate"):
        ChatRenderer(tokenizer, "{{ messages[0]['content'] + 5 }}")(USER)


def test_template_kwargs(tokenizer):
    renderer = ChatRenderer(tokenizer, "{{ mood }}{{ messages[0]['content'] }}", chat_template_kwargs={"mood": "calm "})
    assert renderer(USER).text == "calm hi"
    with pytest.raises(ValueError, match=r"Found unexpected chat template kwargs from request: \['tokenize'\]"):
        ChatRenderer(tokenizer, chat_template_kwargs={"tokenize": True})


def test_tools_and_their_calls(tokenizer):
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert ChatRenderer(tokenizer, "{{ tools[0].function.name }}", tools=tools)(USER).text == "look"
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": '{"at": 5}'}}],
    }
    template = "{{ messages[0].tool_calls[0].function.arguments.at + 1 }}"
    assert ChatRenderer(tokenizer, template)([call]).text == "6"
    assert isinstance(call["tool_calls"][0]["function"]["arguments"], str)
    call["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(ValueError, match="not valid JSON"):
        ChatRenderer(tokenizer, template)([call])


def test_needs_a_tokenizer():
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        ChatRenderer(None)


def test_wrong_content_format(tokenizer):
    with pytest.raises(ValueError, match="chat_template_content_format must be"):
        ChatRenderer(tokenizer, None, "xml")


def test_lone_surrogates(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        ChatRenderer(tokenizer)([{"role": "user", "content": "\udc00"}])
