"""Conversations, with the model's own chat template. Argument: a model folder, a .gguf file or a hub id."""

import sys

from shoal import LLM, SamplingParams

conversations = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "Is ice colder than steam?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
]
with LLM(model=sys.argv[1]) as llm:
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=32))
    for conversation, output in zip(conversations, outputs, strict=True):
        completion = output.outputs[0]
        print(f"{conversation[-1]['content']} -> {completion.text.strip()} ({completion.finish_reason})")
