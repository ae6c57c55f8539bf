"""python -m dllmq.report outputs/<sweep>: table.md, summary.json and report.html from the runs' records."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from dllmq.report.build import PAGE, SUMMARY, TABLE, write_report
from dllmq.report.table import print_tables
from dllmq.report.tables import sweep_tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dllmq.report", description=__doc__)
    parser.add_argument("folder", help="a sweep's folder; records are found at any depth")
    parser.add_argument("--png", action="store_true", help="also write the figures to <folder>/figures/*.png")
    args = parser.parse_args(argv)
    try:
        sweep = write_report(args.folder, png=args.png)
    except (ValueError, OSError) as error:
        print(f"dllmq.report: {error}", file=sys.stderr)
        return 2
    print_tables(sweep_tables(sweep), Console())
    print(f"Wrote {SUMMARY}, {TABLE} and {PAGE} to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
