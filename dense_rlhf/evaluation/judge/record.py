"""An endpoint's judgements by key: a file of JSON lines, one a request, that any number of processes share."""

from __future__ import annotations

from pathlib import Path

from dense_rlhf.files import append_line, parse_line
from dense_rlhf.types import InputError


class Record:
    """The lines of `path`: `values` by key, and the `calls` and `tokens` that all lines cost.

    A line holds the key, judge, model, template, reply, tokens, seconds, time, and either the `value` or the `reason`
    for having none; never the endpoint's secret key or address. Unlike a `Journal` it keeps failed attempts too.
    """

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, float] = {}
        self.calls = self.tokens = self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read lines that were added since, by any process. Raises `InputError` if the file is something else."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # a last line that a crash cut short is overwritten by the next
        for line in whole.splitlines():
            self._count(parse_line(line, f"a line of {self.path}"))
        self._read += len(whole)

    def _count(self, line: dict) -> None:
        key, value, tokens = (line.get(name) for name in ("key", "value", "tokens"))
        if not isinstance(key, str) or not isinstance(tokens, int) or not isinstance(value, float | int | None):
            raise InputError(f"{self.path} is no record of judgements; move it away, or name another file")
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens
        if value is not None:
            self.values.setdefault(key, float(value))  # the first judgement stays

    def add(self, line: dict) -> None:
        """Append a line, on disk when this returns."""
        append_line(self.path, line)
        self.refresh()
