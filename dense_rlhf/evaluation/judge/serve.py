"""A judge on this machine: SmolLM2-135M-Instruct behind `transformers serve`, which speaks OpenAI's chat protocol.

It tests the way to a judge, not a policy: its verdicts are worth nothing.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from dense_rlhf.files import cache_root
from dense_rlhf.types import InputError

MODEL = "SmolLM2-135M-Instruct"  # a request must name it
HOST = "127.0.0.1"  # nobody else's business


def serve(port: int) -> None:
    """Serve until it is stopped. Raises `InputError` where the extra `serve` is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; pip install 'dense-rlhf[serve]'")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers loads: a server that reads local files asks nobody
    os.chdir(served_folder().parent)  # the server's name of a model is the path that it was given
    from transformers.cli.serve import Serve

    Serve(MODEL, host=HOST, port=port)


def served_folder() -> Path:
    """The model's folder under its own name."""
    from dense_rlhf.models.language_models import smollm2_folder

    link, target = cache_root() / "served" / MODEL, smollm2_folder()
    if not link.is_symlink() or link.readlink() != target:
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{MODEL}-{os.getpid()}")
        draft.symlink_to(target)
        draft.replace(link)
    return link


def how(port: int) -> str:
    """What another terminal is to be told."""
    return f"export OPENAI_BASE_URL=http://{HOST}:{port}/v1 OPENAI_API_KEY=none OPENAI_MODEL={MODEL}"
