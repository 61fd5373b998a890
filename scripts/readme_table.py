"""Write the README's result table from the records in `results/demo/`, or check that it is current.

    python scripts/readme_table.py [--check]

Each record is the `scores.json` of one `unbackdoor demo --seed SEED`; the table has medians.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results/demo -->\n", "<!-- end -->\n"
ROWS = {
    "victim": "victim",
    "fine_tuned": "fine-tuned, 500 labels",
    "purified": "**purified, no labels**",
}
READINGS = ("delivered", "reestimated", "fine_tuned")


def table(records: list[dict[str, dict]]) -> str:
    """Return the table of the records' medians, in percent."""

    def median(row: str, *, reading: str, what: str) -> str:
        values = [record["scores"][row][reading][what] for record in records]
        return f"{100 * statistics.median(values):.1f}"

    lines = [
        "| backbone | probe: ACC | ASR | PA | ASR, statistics re-estimated | ASR, fine-tuned clean "
        "| own head: ACC | ASR | PA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, name in ROWS.items():
        cells = [
            *(median(row, reading="delivered", what=what) for what in ("acc", "asr", "pa")),
            *(median(row, reading=reading, what="asr") for reading in READINGS[1:]),
            *(median(row, reading="head", what=what) for what in ("acc", "asr", "pa")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Replace or check what stands between the two marks in the README."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if outdated")
    arguments = parser.parse_args()
    paths = sorted((ROOT / "results/demo").glob("seed*.json"))
    new = table([json.loads(path.read_text()) for path in paths])
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    if arguments.check:
        if old != new:
            print("README.md: the result table is outdated; run python scripts/readme_table.py")
        return int(old != new)
    readme.write_text(before + BEGIN + new + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
