"""The shortest use: prompts in, completions out. Argument: a model folder, a .gguf file or a hub id."""

import sys

from shoal import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
llm = LLM(model=sys.argv[1])
for output in llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=0)):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
llm.shutdown()
