"""AlpacaEval 2 (Dubois et al., 2024, arXiv 2404.04475) through its own package: files in, its annotator, files out.

`alpaca_eval` 0.6.6 cannot share an environment with this project: it imports `pkg_resources`, asks `datasets` to trust
remote code, and its length control relies on row numbers that pandas sorts since 2.2. It gets an environment of its
own from `locks/alpaca_eval.txt`, made on first use, and runs as a subprocess.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.data import read_rows
from dense_rlhf.data.dataset import check_unicode
from dense_rlhf.evaluation import environment
from dense_rlhf.files import write_json, write_text
from dense_rlhf.runs import shipped
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

HUB = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
LOCK = shipped("locks/alpaca_eval.txt")
FULL = 805  # instructions of AlpacaEval; its length control knows the difficulty of these alone
THEIRS = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's annotator
OURS = "endpoint"  # our annotator: the judge's model, with examples of how to answer by a letter
EXAMPLES = (
    ("Name a large city.", "Bread is eaten.", "London.", "B"),
    ("What is 2 plus 2?", "4", "I like films.", "A"),
    ("Say hello.", "Hello!", "It is cold.", "A"),
    ("Name a colour.", "Run.", "Red.", "B"),
)
ASK = """<|im_start|>user
Instruction: {instruction}

Answer A: {output_1}

Answer B: {output_2}

Which answer is better, A or B?
<|im_end|>
"""
REPLY = "<|im_start|>assistant\n{}\n<|im_end|>\n"
LETTERS = {1: r"^\W*A\b", 2: r"^\W*B\b"}  # how a reply must begin


def read_instructions(path: str | None, most: int | None = None, revision: str | None = None) -> list[dict]:
    """Rows of instruction, output and generator, to compare outputs with: those at `path`, or the hub's without one.

    Raises `InputError` for a row without these fields. Reading from the hub is untested.
    """
    where = path or _from_hub(revision)
    rows = read_rows(Path(where))[:most]
    for number, row in enumerate(rows, 1):
        texts = [row.get(key) for key in ("instruction", "output", "generator")]
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{where}, row {number}: wanted instruction, output and generator, all of them text")
        try:
            check_unicode(*texts)
        except InputError as error:
            raise InputError(f"{where}, row {number}: {error}") from None
    if not rows or len({row["generator"] for row in rows}) > 1:
        raise InputError(f"{where}: wanted at least one row, and outputs of one generator")
    return rows


def _from_hub(revision: str | None) -> str:
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(*HUB, repo_type="dataset", revision=revision)
    except Exception as error:  # the hub's errors share no base class
        raise InputError(
            f"downstream.alpaca_path: cannot load {'/'.join(HUB)} from the hub ({type(error).__name__}). "
            "Without a hub, give a local JSON file of its rows"
        ) from error


def evaluate(
    folder: Path, rows: Sequence[Mapping], outputs: Sequence[str], generator: str, annotator: str, model: str
) -> tuple[dict[str, float], pd.DataFrame]:
    """Have `generator`'s outputs compared with those in `rows`; returns what `read_back` does.

    `model` is asked by our own annotator, `OURS`; other annotators name their model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_outputs(folder / "model_outputs.json", rows, outputs, generator)
    write_json(folder / "reference_outputs.json", list(rows))
    config = annotator_config(annotator, model, folder)
    annotate(folder, config, len(rows) == FULL)
    return read_back(folder, generator, len(rows))


def write_outputs(path: Path, rows: Sequence[Mapping], outputs: Sequence[str], generator: str) -> None:
    """Write `model_outputs.json`: `generator`'s output for the instruction of each row."""
    if len(rows) != len(outputs):
        raise InputError(f"{len(outputs)} outputs for {len(rows)} instructions, wanted one each")
    write_json(path, [dict(row) | {"output": text, "generator": generator} for row, text in zip(rows, outputs)])


# ---------------------------------------------------------------------------------------------------- the package


def python() -> Path:
    """The Python that has alpaca_eval. Raises `InputError` if pip cannot make its environment."""
    return environment.python("alpaca_eval", LOCK, "or leave AlpacaEval out: downstream.alpaca_annotator=null")


def annotator_config(name: str, model: str, folder: Path) -> str:
    """An annotator as alpaca_eval names it: its own name, a folder, or that of `OURS`, written into `folder`."""
    if name != OURS:
        return str(Path(name).resolve()) if Path(name).is_dir() else name
    import yaml

    answer = {"model_name": model, "max_tokens": 4, "temperature": 0.0, "requires_chatml": True}
    config = dict(fn_completions="openai_completions", completions_kwargs=answer, prompt_template=f"{OURS}/prompt.txt")
    config |= dict(fn_completion_parser="regex_parser", completion_parser_kwargs={"outputs_to_match": LETTERS})
    asked = [ASK.format(instruction=text, output_1=a, output_2=b) + REPLY.format(best) for text, a, b, best in EXAMPLES]
    write_text(folder / OURS / "prompt.txt", "".join(asked) + ASK)
    write_text(folder / OURS / "configs.yaml", yaml.safe_dump({OURS: config | {"batch_size": 1}}))
    return str((folder / OURS).resolve())


def annotate(folder: Path, config: str, length_control: bool) -> None:
    """Run alpaca_eval on `model_outputs.json` and `reference_outputs.json`, in the folder that holds them.

    It writes `leaderboard.csv`, `annotations.json` and `cache.json`, so that nothing is annotated twice. The endpoint
    is the environment's. Length control needs the hub's table of difficulties. Raises `InputError` with the last line
    of alpaca_eval's errors if it fails.
    """
    here = folder.resolve()
    options = {
        "model_outputs": here / "model_outputs.json",
        "reference_outputs": here / "reference_outputs.json",
        "annotators_config": config,
        "output_path": here,
        "caching_path": here / "cache.json",
        "precomputed_leaderboard": None,
        "is_cache_leaderboard": False,
        "fn_metric": "get_length_controlled_winrate" if length_control else "get_winrate",
        "metric_kwargs": {"save_weights_dir": None} if length_control else None,
        "sort_by": "length_controlled_winrate" if length_control else "win_rate",
    }
    command = [str(python()), "-m", "alpaca_eval.main", "evaluate", *(f"--{k}={v}" for k, v in options.items())]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= {} if length_control else {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=alone)
    if done.returncode:
        raise InputError(f"alpaca_eval ended with code {done.returncode}: {_last_line(done.stderr)}")


def _last_line(errors: str) -> str:
    """The last line without the key, which is removed before the line is cut, so that no part of it remains."""
    line = next((line for line in reversed(errors.splitlines()) if line.strip()), "it gave no reason")
    key = os.environ.get("OPENAI_API_KEY")
    return (line.replace(key, "***") if key else line)[:300]


def read_back(folder: Path, generator: str, wanted: int) -> tuple[dict[str, float], pd.DataFrame]:
    """The leaderboard's row of `generator` by name (win_rate, in per cent, ...), and the annotations.

    A row an instruction: instruction, preference in [0, 1] for the generator (NaN for an unreadable reply), output_1
    (the reference's), output_2. Raises `InputError` unless there are `wanted` rows, and for files of another form.
    """
    import pandas as pd

    path = next(iter(sorted(folder.rglob("annotations.json"))), folder / "annotations.json")
    rows = pd.DataFrame(read_rows(path))
    if len(rows) != wanted or "generator_2" not in rows or not (rows["generator_2"] == generator).all():
        raise InputError(
            f"{path}: {len(rows)} annotations, wanted {wanted} of {generator}; no instruction may be there twice"
        )
    try:
        rows["preference"] = rows["preference"].astype(float) - 1
        row = pd.read_csv(path.with_name("leaderboard.csv"), index_col=0).loc[generator]
        board = {name: float(value) for name, value in row.items() if name != "mode"}
    except (OSError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} or its leaderboard.csv is damaged ({reason}); delete both and run again") from error
    if ((rows["preference"] < 0) | (rows["preference"] > 1)).any():
        raise InputError(f"{path}: a preference is outside of 1 to 2; delete it and run again")
    return board, rows
