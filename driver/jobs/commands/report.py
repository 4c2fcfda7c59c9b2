"""`shoal report`: report.html and report.json of a job, while it runs or whenever later."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from shoal.driver.jobs.state.folder import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shoal report`."""
    parser.add_argument("run", metavar="RUN", help="the output of a job, or its state folder (OUT.shoal, OUT/_shoal)")
    parser.add_argument(
        "-o", "--output", metavar="FILE.html", help="write the page there, and into the state folder nothing"
    )
    parser.add_argument("--json", action="store_true", help="print report.json's content, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Writes the report and says where it is."""
    from shoal.driver.jobs.report.write import PAGE_FILE, find_state, make_report, write_report

    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {Path(args.output).absolute().parent}")
    store, place = find_state(args.run)
    try:
        report, page = make_report(store)
        if args.json:
            print(json.dumps(report, indent=1))
            return 0
        where = args.output or f"{place}/{PAGE_FILE}"
        if args.output is None:
            write_report(store)
        else:
            write_whole(os.path.abspath(args.output), page.encode())
    finally:
        store.close()
    print(f"{where}: {_line(report)}")
    return 0


def _line(report: dict[str, Any]) -> str:
    rows, tokens = report["request_counts"], report["tokens"]
    total = "" if rows["total"] is None else f" of {rows['total']:,}"
    return (
        f"{report['status']}, {rows['completed']:,}{total} rows answered, {rows['failed']:,} errors, "
        f"{tokens['generated']:,} tokens generated, {report['mean_rates']['generated_tok_s']:,.1f} tok/s"
    )
