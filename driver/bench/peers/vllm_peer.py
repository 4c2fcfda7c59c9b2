"""vLLM on a benchmark's requests: vllm_peer.py JOB.json RESULT.json. Stands alone; see ../peer.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Two runs with the prefix cache reset before each."""
    import vllm

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    started = time.perf_counter()
    llm = vllm.LLM(
        job["model"],
        load_format=job["load_format"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        tensor_parallel_size=job["tensor_parallel_size"],
        enable_prefix_caching=job["enable_prefix_caching"],
        skip_tokenizer_init=True,
        **job["arguments"],
    )
    startup_s = time.perf_counter() - started
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    params = [
        vllm.SamplingParams(temperature=job["temperature"], max_tokens=length, ignore_eos=True, detokenize=False)
        for length in job["num_outputs"]
    ]
    runs = []
    for _ in range(job["num_runs"]):
        llm.reset_prefix_cache()
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        runs.append({"seconds": seconds, "lengths": [len(output.outputs[0].token_ids) for output in outputs]})
    result = {"version": vllm.__version__, "startup_s": startup_s, "runs": runs}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main(*sys.argv[1:])
