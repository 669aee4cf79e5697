"""Did a change of the code change a number? Compares the `metrics.json` of two run folders of one study, job by job.

    python tests/same_numbers.py runs/before runs/after

Prints each number that differs, and ends with 1 where one does. Names of code, times and hashes are no results.
"""

import json
import sys
from pathlib import Path

ASIDE = ("seconds", "revisions", "processor", "commit")  # parts of a name that stands for no result


def numbers(value, name=""):
    """Every leaf of nested JSON by its dotted name."""
    if any(part in name for part in ASIDE):
        return {}
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, item in items for key, leaf in numbers(item, f"{name}.{part}").items()}
    return {name: value}


def differences(before: Path, after: Path) -> list[str]:
    """A line for each number that one folder has and the other has not, or has as another."""
    differences = []
    jobs = {path.parent.name for folder in (before, after) for path in folder.glob("*/metrics.json")}
    for job in sorted(jobs):
        sides = [folder / job / "metrics.json" for folder in (before, after)]
        if missing := [str(side) for side in sides if not side.exists()]:
            differences.append(f"{job}: no {missing[0]}")
            continue
        old, new = (numbers(json.loads(side.read_text())) for side in sides)
        differences += [
            f"{job}{name}: {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
        ]
    return differences


if __name__ == "__main__":
    lines = differences(*map(Path, sys.argv[1:3]))
    print("\n".join(lines) or "every number is the same")
    sys.exit(bool(lines))
