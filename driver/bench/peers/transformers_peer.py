"""transformers' `generate` on a benchmark's requests: transformers_peer.py JOB.json RESULT.json. Stands alone; see
../peer.py.

Static batches in input order, padded on the left. Each runs as long as its longest output; only a row's own tokens
count as output.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    """Two runs of all batches."""
    import torch
    import transformers

    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    options = {"batch_size": 64} | job["arguments"]
    started = time.perf_counter()
    device = torch.device(job["device"])
    dtype = getattr(torch, job["dtype"])
    load: Any = transformers.AutoModelForCausalLM
    if job["load_format"] == "dummy":
        with device:
            model = load.from_config(transformers.AutoConfig.from_pretrained(job["model"]), dtype=dtype)
    else:
        model = load.from_pretrained(job["model"], dtype=dtype).to(device)
    model = model.eval()
    # An eos_token_id of None in a call means "the model's own": rows are to run to their full length.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    startup_s = time.perf_counter() - started
    runs = []
    for _ in range(job["num_runs"]):
        begun = time.perf_counter()
        lengths = run_all(model, job, options["batch_size"])
        runs.append({"seconds": time.perf_counter() - begun, "lengths": lengths})
    result = {"version": transformers.__version__, "startup_s": startup_s, "runs": runs}
    Path(result_file).write_text(json.dumps(result))


def run_all(model: Any, job: dict[str, Any], batch_size: int) -> list[int]:
    """Number of tokens of each row."""
    import torch
    from transformers import GenerationConfig

    rows = list(zip(job["prompts"], job["num_outputs"], strict=True))
    lengths: list[int] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(len(prompt) for prompt, _ in batch)
        ids = [[0] * (width - len(prompt)) + prompt for prompt, _ in batch]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]
        longest = max(length for _, length in batch)
        sampled = job["temperature"] >= 1e-5
        options = GenerationConfig(
            do_sample=sampled,
            temperature=job["temperature"] if sampled else None,
            top_k=0 if sampled else None,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=options,
            )
        made = out[:, width:].tolist()  # waits for the device
        lengths += [len(tokens[:length]) for tokens, (_, length) in zip(made, batch, strict=True)]
    return lengths


if __name__ == "__main__":
    main(*sys.argv[1:])
