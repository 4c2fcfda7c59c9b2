"""A batch with bad rows in it: each bad row says why in its place, the others are answered.

Argument: a model folder, a .gguf file or a hub id.
"""

import sys

from shoal import LLM, SamplingParams

prompts = [
    "The capital of France is",
    {"prompt_token_ids": []},  # empty
    "word " * 600,  # longer than max_model_len
    {"prompt_token_ids": [10**9]},  # no such token
    "Water boils at",
]
with LLM(model=sys.argv[1], max_model_len=512) as llm:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8), on_error="return")
    for index, output in enumerate(outputs):
        print(f"row {index}: " + (f"error: {output.error}" if output.error else repr(output.outputs[0].text)))

    # The default, on_error="raise", refuses the whole call at the first bad row and leaves nothing behind.
    try:
        llm.generate(prompts, SamplingParams(max_tokens=8))
    except ValueError as error:
        print(f"on_error='raise': ValueError: {error}")
