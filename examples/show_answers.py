"""Prints some rows of a job's output: show_answers.py answers.jsonl. Ends with 1 where a row has no answer."""

import json
import sys
from pathlib import Path

SHOWN = ("capital-of-france", "fix-grammar", "summary-library", "python-function")


def main() -> int:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    for row in [row for row in rows if row["id"] in SHOWN] or rows[:3]:
        question = " ".join(row["messages"][-1]["content"].split())
        print(f"\n[{row['id']}] {question if len(question) <= 160 else question[:157] + '...'}")
        print((row["generated_text"] or "").strip() or row["error"])
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"not answered: {row['id']}: {row['error']['message']}", file=sys.stderr)
    print(f"\n{len(rows) - len(failed)} of {len(rows)} rows answered, in {sys.argv[1]}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
