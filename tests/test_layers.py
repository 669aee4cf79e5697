"""The import rule: a module imports from lower layers only, and nothing heavy where an answer must come at once."""

import ast
import subprocess
import sys

import pytest

from dense_rlhf.store import PACKAGE

LAYERS = {
    "types": 0, "strict": 0, "params": 0, "params_judge": 0, "study": 0, "masked": 0, "store": 0, "escape": 0,
    "alignment": 1, "data": 1, "models": 1, "policy": 1, "processes": 1, "reward_model": 1, "rewards": 1, "additive": 1,
    "language_model": 1, "statistics": 1, "surrogate": 1,
    "rollout": 2, "attribution": 2, "context": 2, "shaping": 2, "ppo": 2, "checkpoint": 2, "health": 2, "bayesopt": 2,
    "judge": 2, "toy": 2, "implicit": 2, "ledger": 2, "landscapes": 2, "overoptimisation": 2,
    "bilevel": 3, "arms": 3, "baselines": 3, "budget": 3, "audit": 3, "dimension": 3, "downstream": 3,
    "runs": 4, "runner": 4, "plots": 4, "plots_search": 4, "display": 4, "explore": 4, "explain": 4, "live": 4,
    "report": 4, "train": 4, "check": 4,
    "__main__": 4,
}  # fmt: skip
# within a layer: everyone may raise InputError and read the parameters; the others are spelt out
SIDEWAYS = {(module, "types") for module in ("strict", "params", "params_judge", "study", "masked", "store")} | {
    ("params", "strict"), ("params", "params_judge"), ("study", "params"), ("study", "strict"),
    ("policy", "reward_model"), ("checkpoint", "ppo"), ("shaping", "context"), ("baselines", "bilevel"),
    ("arms", "bilevel"), ("dimension", "audit"), ("judge", "ledger"),
    ("rewards", "data"), ("rewards", "reward_model"), ("reward_model", "alignment"),
    ("additive", "alignment"), ("implicit", "rollout"),
    ("explore", "display"), ("explain", "display"), ("live", "display"), ("live", "plots"), ("plots_search", "plots"),
    ("runner", "runs"), ("report", "runs"), ("report", "plots"), ("report", "live"),
    ("train", "runner"), ("train", "live"), ("train", "runs"),
    ("__main__", "check"), ("__main__", "runner"), ("__main__", "report"), ("__main__", "runs"), ("__main__", "train"),
}  # fmt: skip


def imports(path):
    """Names of this package's modules that a file imports when it runs (not for type checking only)."""
    nodes, found = list(ast.walk(ast.parse(path.read_text()))), set()
    checked = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typing_only = {inner for node in checked for inner in ast.walk(node)}
    for node in set(nodes) - typing_only:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dense_rlhf"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & set(LAYERS)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield pytest.param(name, path, id=str(path.relative_to(PACKAGE)))


@pytest.mark.parametrize("name, path", list(modules()))
def test_imports_point_down(name, path):
    for other in imports(path) - {name}:
        assert LAYERS[other] < LAYERS[name] or (name, other) in SIDEWAYS, f"{name} imports {other}"


def test_every_module_has_a_layer():
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert names == set(LAYERS)


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_validation_needs_nothing_heavy():
    code = ("import sys, dense_rlhf.runner.grid, dense_rlhf.study, dense_rlhf.__main__; "
            "print([m for m in ('torch', 'transformers', 'numpy', 'pandas', 'trl') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
