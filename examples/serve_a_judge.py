"""A judge on this machine: SmolLM2-135M-Instruct behind `transformers serve`, which speaks OpenAI's chat protocol.

    python examples/serve_a_judge.py [--port 8000]    # wants pip install 'dense-rlhf[serve]'; ends with Ctrl-C

It shows that everything between a study and its judge works. So small a model judges nothing: its verdicts are noise.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from dense_rlhf.files import cache_root

MODEL = "SmolLM2-135M-Instruct"  # a request must name it
HOST = "127.0.0.1"  # reachable from this machine alone


def served_folder() -> Path:
    """The model's folder under the model's name: the server calls a model by the path that it was given."""
    from dense_rlhf.models.language_models import smollm2_folder

    link, target = cache_root() / "served" / MODEL, smollm2_folder()
    if not link.is_symlink() or link.readlink() != target:
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{MODEL}-{os.getpid()}")
        draft.symlink_to(target)
        draft.replace(link)
    return link


def main(port: int) -> None:
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)}: not installed; pip install 'dense-rlhf[serve]'")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the server reads local files alone
    os.chdir(served_folder().parent)
    from transformers.cli.serve import Serve

    where = f"OPENAI_BASE_URL=http://{HOST}:{port}/v1 OPENAI_API_KEY=none OPENAI_MODEL={MODEL}"
    print(f"In another terminal: export {where}", flush=True)
    Serve(MODEL, host=HOST, port=port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    main(parser.parse_args().port)
