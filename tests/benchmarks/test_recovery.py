"""What the page says of recovered runs is what their records say."""

import json
from pathlib import Path

from benchmarks.recovery.__main__ import rows

ROOT = Path(__file__).parents[2]


def test_the_page_says_how_many_recovered_runs_came_near_their_controls():
    records = (ROOT / "benchmarks" / "recovery" / "records").glob("*.json")
    *kinds, total = rows([json.loads(path.read_text()) for path in records])
    page = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
    assert f"**{total['within']} of {total['diverged']} are**" in page
    for row in kinds:
        worst = row["worst"].replace("+0.", "+.").replace("%", " %")
        assert f"| {row['runs']} | {row['diverged']} | {row['attempts']} | {row['within']} |" in page
        assert f" to {worst} |" in page
        twin = row["beyond_twin"].replace("+0.", "+.").replace("%", "")
        assert not twin or f"| {twin} % |" in page
