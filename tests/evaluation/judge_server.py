"""Fixtures: a judge's server, and starts of one run on it. A second conftest would hide the first one's constants."""

from dataclasses import replace

import pytest
from chat_server import KEY, QUICK, chat_server

from dense_rlhf.evaluation.judge import Endpoint


@pytest.fixture
def server(monkeypatch):
    with chat_server() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_MODEL", "judge-1")
        yield server


@pytest.fixture
def start(tmp_path):
    """Starts of one run, which share its record."""
    return lambda **changes: Endpoint(tmp_path / "run" / "judgements.jsonl", replace(QUICK, **changes))
