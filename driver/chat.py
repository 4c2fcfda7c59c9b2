"""Conversations to prompts: messages, content parts, tools and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shoal.driver.inputs import Prompt, parse_prompt
from shoal.driver.local_files import is_template_text, read_template

ContentFormat = Literal["auto", "string", "openai"]

_TEXT_PARTS = ("text", "input_text", "output_text")
_OWN_ARGUMENTS = {  # given to the template by chat() itself
    "chat_template",
    "tokenize",
    "conversation",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
}
# A template that loops over a message's content wants parts, not a string.
_LOOPS_OVER_CONTENT = re.compile(
    r"for\s+\w+\s+in\s+\w+(\.content|\[['\"]content['\"]\])|message_content\s+in\s+content"
)


class ChatTemplateError(ValueError):
    """There is no chat template to render a conversation with."""


def split_conversations(messages: Any) -> Sequence[Any]:
    """The conversations one by one: a list of messages is one conversation, a list of such lists is many."""
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise TypeError(
            "messages should be a list of messages (dicts with 'role' and 'content') or a list of such lists, "
            f"got {type(messages).__name__}"
        )
    if not (hasattr(messages, "__len__") and hasattr(messages, "__getitem__")):
        messages = list(messages)
    if not len(messages):
        return []
    conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
    return conversations


def check_conversation(conversation: Any) -> None:
    """Raises TypeError where a conversation is not a list of message dicts."""
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        raise TypeError(f"A conversation should be a list of messages, got {type(conversation).__name__}")
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"A message should be a dict with a 'role', got {message!r:.80}")


class ChatRenderer:
    """Renders conversations with one template and one set of arguments."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        content_format: ContentFormat = "auto",
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allowed_folder: str | None = None,
    ) -> None:
        """`chat_template`: Jinja text, a path to it, or a name of one of the tokenizer's; None: the tokenizer's own.

        `allowed_folder`: where such a path may lie, beside the working directory.
        """
        if tokenizer is None:
            raise ValueError("chat() needs a tokenizer, but skip_tokenizer_init=True: use generate() with token ids")
        extra = dict(chat_template_kwargs or {})
        unexpected = sorted(_OWN_ARGUMENTS & extra.keys())
        if unexpected:
            raise ValueError(
                f"Found unexpected chat template kwargs from request: {unexpected}. Give them as arguments of chat()."
            )
        if content_format not in ("auto", "string", "openai"):
            raise ValueError(
                f"chat_template_content_format must be 'auto', 'string' or 'openai', got {content_format!r}"
            )
        self._tokenizer = tokenizer
        self._template = load_chat_template(chat_template, tokenizer, allowed_folder)
        self._arguments = {
            **extra,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": None if tools is None else list(tools),
        }
        self._as_parts = content_format == "openai" or (
            content_format == "auto" and bool(_LOOPS_OVER_CONTENT.search(self._source(tools is not None)))
        )

    def __call__(self, conversation: Any) -> Prompt:
        """The conversation's prompt. ValueError for parts that are no text, and for whatever the template raises."""
        check_conversation(conversation)
        messages = [self._message(message) for message in conversation]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, **self._arguments
            )
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, ValueError
            raise ValueError(f"{error}" if str(error) else f"the chat template raised {error!r}") from error
        return parse_prompt(text)

    def _source(self, has_tools: bool) -> str:
        """The text of the template in use. ChatTemplateError when there is none."""
        if self._template is not None and is_template_text(self._template):
            return self._template
        try:
            return str(self._tokenizer.get_chat_template(self._template, tools=[{}] if has_tools else None))
        except ValueError as error:
            raise ChatTemplateError(
                "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
                f"template if the tokenizer does not define one: chat(..., chat_template=...). ({error})"
            ) from None

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(message)
        content = message.get("content")
        if content is not None:
            texts = _part_texts(content)
            if self._as_parts:
                result["content"] = [{"type": "text", "text": text} for text in texts]
            else:
                result["content"] = "\n".join(texts)
        if message.get("tool_calls"):
            result["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        return result


def load_chat_template(template: str | None, tokenizer: Any, allowed_folder: str | None = None) -> str | None:
    """Template text from text, from a path, or (left as it is) the name of one of the tokenizer's templates."""
    if template is None:
        return None
    if not isinstance(template, str):
        raise TypeError(f"chat_template must be a str, got {type(template).__name__}")
    named = tokenizer.chat_template
    if isinstance(named, dict) and template in named:
        return template
    return read_template("chat_template", template, allowed_folder)


def _part_texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise TypeError(f"A message's content should be a string or a list of parts, got {type(content).__name__}")
    return [_part_text(part) for part in content]


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise TypeError(f"A content part should be a string or a dict with a 'type', got {type(part).__name__}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_PARTS:
        raise ValueError(
            f"Unsupported chat content part type: {kind!r}. Multimodal input is not supported by this version of Shoal."
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise TypeError(f"A content part of type {kind!r} should have a 'text' string, got {type(text).__name__}")
    return text


def _tool_call(call: Any) -> Any:
    """Arguments as a dict: clients write them as JSON text, templates expect the object."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise ValueError(f"arguments of a tool call are not valid JSON: {error}") from None
    return {**call, "function": function}
