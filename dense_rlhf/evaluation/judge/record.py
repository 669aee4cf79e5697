"""What an endpoint has judged, by content: a JSON line for each request that any number of processes share."""

from __future__ import annotations

from pathlib import Path

from dense_rlhf.files import append_line, parse_line
from dense_rlhf.types import InputError


class Record:
    """The lines of `path`: `values` by key, and how many `calls` and `tokens` all of them cost.

    A line holds the key and what it is of (judge, model, template), the reply, tokens, seconds, time, and either the
    `value` or the `reason` why there is none. Never a key of the endpoint nor its address.
    """

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, float] = {}
        self.calls = self.tokens = self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what was added since, by others too. Raises `InputError` for a file of something else."""
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
