"""The verdicts of a study from its run folders with scipy alone, next to those that notebook 09 left.

    python tests/recompute_verdicts.py runs/reviews [dataset]

Shares no code with the package: it reads tables, parameters and records, and follows the rule as the page states it.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats

CONTROLS, SPARSE = {"uniform", "random", "shuffled", "shuffled_attention"}, {"terminal", "sparse"}
SMOOTH, WIDTH, FEWEST = 3, 1.6, 5  # updates of running means; half a window in sqrt(nats), and policies in it
APART = ("arm", "seed", "threads", "shape", "run", "bo")  # first words of parameters that pairs may differ in
SUPPORTED, CONTRADICTED, SAME, UNDECIDED = "supported", "contradicted", "no difference that matters", "undecided"


class Study:
    """All that the verdicts need of one dataset."""

    def __init__(self, folder, dataset):
        self.arms, self.longer, self.searches = {}, {}, {}
        for path in sorted(Path(folder).glob("*/run.json")):
            record, run = json.loads(path.read_text()), path.parent
            flat = yaml.safe_load((run / "params.yaml").read_text()) if (run / "params.yaml").exists() else {}
            arm, seed, kind = record["arm"], record["seed"], record["notebook"][:2]
            if record["status"] not in ("ok", "cached") or kind not in ("04", "05"):
                continue
            if kind == "05" and record["dataset"] == dataset:
                self.searches.setdefault(arm, {})[seed] = flat
            elif record["dataset"] == dataset:
                self.arms.setdefault(arm, {})[seed] = (run, flat)
            elif record["dataset"] == f"{dataset}-longer":
                self.longer.setdefault(arm, {})[seed] = pd.read_csv(run / "history.csv")
        everywhere = all((run / "test.csv").exists() for by in self.arms.values() for run, _ in by.values())
        table = "test.csv" if everywhere else "evaluation.csv"
        self.judged = {a: {s: pd.read_csv(run / table) for s, (run, _) in by.items()} for a, by in self.arms.items()}
        self.gold = {a: {s: t["gold"].mean() for s, t in by.items()} for a, by in self.judged.items()}
        self.path = {
            a: {s: pd.read_csv(run / "history.csv") for s, (run, _) in by.items()} for a, by in self.arms.items()
        }
        self.flat = {a: next(iter(by.values()))[1] for a, by in self.arms.items()}
        self.margin = min(flat.get("evaluation_margin", 0.1) for flat in self.flat.values())
        self.sparse = next(a for a in sorted(self.arms, key=lambda a: a != "sparse") if set(self.sources(a)) <= SPARSE)
        self.seeds = len(self.arms[self.sparse])
        reach = {a: [smooth(run)["kl"].max() for run in by.values()] for a, by in self.path.items()}
        low, far = min(map(min, reach.values())), min(reach[max(reach, key=lambda a: np.mean(reach[a]))])
        self.levels = [low, far] if far >= 1.1 * low else [low]

    def sources(self, arm):
        return self.flat[arm].get("shape_sources") or [arm]

    def normalise(self, arm):
        return self.flat[arm].get("shape_normalise", "")

    def is_control(self, arm):
        return not set(self.sources(arm)) <= SPARSE and set(self.sources(arm)) <= CONTROLS | {"terminal"}

    def controls(self, arm):
        names = [a for a in self.arms if self.is_control(a)]
        placebo = any("shuffled" in self.sources(a) and self.normalise(a) == self.normalise(arm) for a in names)
        return names + ["(missing)"] * (self.normalise(arm) == "signed" and not placebo)

    def dense(self):
        names = [a for a in self.arms if not self.is_control(a) and not set(self.sources(a)) <= SPARSE]
        return [a for a in names if not any(self.is_same(a, b) for b in self.arms if b not in self.searches and b != a)]

    def is_same(self, a, b):
        """Whether an arm learned the weights of another, and its policies have the same gold."""
        paid = [dict(zip(self.sources(arm), self.flat[arm].get("shape_weights", ()))) for arm in (a, b)]
        paid = [{source: weight for source, weight in one.items() if weight > 0} for one in paid]
        alike = paid[0] == paid[1] != {} and self.normalise(a) == self.normalise(b)
        return a in self.searches and alike and self.gold[a] == self.gold[b]

    def values(self, arm, column, level):
        """One number a seed: held-out gold, a metric's mean over the second half, or either where a KL is reached."""
        if arm not in self.arms:
            return None
        if level is None and column == "gold":
            return self.gold[arm]
        paths = self.path[arm]
        if level is None:
            return {s: run.loc[run["update"] >= run["update"].max() / 2, column].mean() for s, run in paths.items()}
        own, on = (
            {s: self.at_kl(run, self.end(arm, s) if runs is paths else None, level, column) for s, run in runs.items()}
            for runs in (paths, self.longer.get(arm, {}))
        )
        reached = [{s: v for s, v in by.items() if v is not None} for by in (own, on)]
        best = reached[1] if len(reached[1]) > len(reached[0]) else reached[0]
        return best if len(best) == len(paths) else None

    def end(self, arm, seed):
        """KL and gold of the final policy on held-out prompts, and how many batches these are; None if not known."""
        batch, judged = self.arms[arm][seed][1].get("ppo_rollouts"), self.judged[arm][seed]
        return (judged["kl"].mean(), judged["gold"].mean(), len(judged) / batch) if batch else None

    def at_kl(self, run, end, level, column):
        """A quadratic in sqrt(KL) fitted around a level, to updates and the end; None where running means of KL stay
        below the level."""
        if smooth(run)["kl"].max() < level - 1e-9:
            return None
        points = [(kl, y, 1.0) for kl, y in zip(run["kl"], run[column])] + [end] * (
            end is not None and column == "gold"
        )
        x, y, w = np.array(points).T
        x = np.sqrt(np.clip(x, 0, None)) - math.sqrt(level)
        near = abs(x) < (h := max(WIDTH, 1.001 * sorted(abs(x))[FEWEST - 1]))
        return float(np.polyfit(x[near], y[near], 2, w=np.sqrt(w[near] * (1 - (x[near] / h) ** 2)))[-1])

    def pairs(self, a, b):
        def fixed(run):
            return {k: v for k, v in run[1].items() if k.split("_")[0] not in APART and k != "ppo_lr"}

        both = self.arms[a].keys() & self.arms[b].keys()
        return bool(both) and all(fixed(self.arms[a][s]) == fixed(self.arms[b][s]) for s in both)


def smooth(run):
    return run.sort_values("update").rolling(SMOOTH, min_periods=1).mean()


class Test:
    """Tests of one arm less another by scipy; p-values are 1 where the numbers are missing."""

    def __init__(self, study, ours, theirs, column, level, log):
        a, b = study.values(ours, column, level), study.values(theirs, column, level)
        self.known = bool(a) and bool(b)
        if not self.known:
            return
        self.paired = study.pairs(ours, theirs)
        seeds = [s for s in a if s in b] if self.paired else None
        a, b = ([v[s] for s in seeds or v] for v in (a, b))
        self.a, self.b = (np.log(v) if log else np.array(v) for v in (a, b))
        self.mean = self.a.mean() - self.b.mean()
        self.flat = (
            len(self.a) > 1 and np.ptp(self.a - self.b if self.paired else np.concatenate([self.a, self.b])) == 0
        )

    def p(self, bound=0.0, alternative="two-sided"):
        if not self.known or min(len(self.a), len(self.b)) < 2:
            return 1.0
        if self.flat:
            gap = self.mean - bound
            return float(not {"two-sided": gap != 0, "greater": gap > 0, "less": gap < 0}[alternative])
        test = stats.ttest_rel if self.paired else stats.ttest_ind
        more = {} if self.paired else {"equal_var": False}
        return float(test(self.a, self.b + bound, alternative=alternative, **more).pvalue)

    def towards(self, sign):
        return self.p() if self.known and self.mean * sign > 0 else 1.0

    def less(self, sign, margin):
        return self.p(margin, "less") if sign > 0 else self.p(-margin, "greater")


def case(study, arm, rivals, controls, question, where):
    """p of: differs as wanted from all, differs the other way from some rival, is within the margin of the best."""
    columns, wanted, log = question
    levels, margin = (
        [None] if where == "equal updates" else study.levels,
        math.log1p(study.margin) if log else study.margin,
    )
    groups = {}
    for name in (*rivals, *controls):
        tests = [(level, Test(study, arm, name, column, level, log)) for column in columns for level in levels]
        groups[name] = [t for level, t in tests if t.known or level == levels[0]]
    own = [groups[name] for name in rivals]
    known = own + [groups[name] for name in controls if all(t.known for t in groups[name])]
    supports = max(t.towards(wanted) for group in groups.values() for t in group)
    opposes = min(1.0, len(own) * min(max(t.towards(-wanted) for t in group) for group in own))
    worse = max(t.less(-wanted, margin) for group in own for t in group)
    better = min(max(t.less(wanted, margin) for t in group) for group in known)
    return supports, opposes, min(1.0, max(worse, len(known) * better))


def holm(p):
    out, last = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        last = out[i] = max(last, min(1.0, (len(p) - rank) * p[i]))
    return out


def asked(study):
    """Question: measures, wanted sign, whether on logarithms; and its arms with rivals and controls."""
    history = next(iter(study.path[study.sparse].values()))
    losses = [name for name in ("value_loss", "value_error_mc") if name in history]
    dense = [(arm, [study.sparse], study.controls(arm)) for arm in study.dense()]
    yield "1a", (losses, -1, True), dense
    yield "1b", (["gold"], 1, False), dense
    yield "2", (["gold"], 1, False), list(learned(study))
    yield "3", (["gold"], -1, False), list(wide(study))
    if attention := list(attended(study)):
        yield "5", (["gold"], 1, False), attention
    lambdas = {flat["ppo_lam"] for by in study.arms.values() for _, flat in by.values() if "ppo_lam" in flat}
    if lambdas == {1} and critic(study) >= 0.5:
        yield "6", (["gold"], 1, False), dense


def learned(study):
    for arm, searches in study.searches.items():
        flat = next(iter(searches.values()))
        if arm not in study.arms or flat.get("bo_strategy") == "random":
            continue
        mixed = [a for a in study.arms if a != arm and set(study.sources(a)) <= set(study.sources(arm))]
        alike = [a for a in mixed if set(study.sources(a)) <= SPARSE or study.normalise(a) == study.normalise(arm)]
        random = [
            a
            for a in alike
            if a in study.searches
            and set(study.sources(a)) == set(study.sources(arm))
            and next(iter(study.searches[a].values())).get("bo_strategy") == "random"
            and next(iter(study.searches[a].values())).get("bo_trials") == flat.get("bo_trials")
        ]
        fixed = [a for a in alike if a not in study.searches]
        if not all(set(study.sources(a)) <= SPARSE for a in fixed):
            yield arm, fixed, study.controls(arm) + random


def wide(study):
    """Nothing unless every arm has one search for each seed."""
    trials = {a: next(iter(by.values())).get("bo_trials", 1) for a, by in study.searches.items() if a in study.arms}
    enough = [a for a in trials if trials[a] >= 25]
    matches = [
        (arm, fewer, [])
        for arm in enough
        if len(study.sources(arm)) >= 4
        and (
            fewer := [a for a in enough if len(study.sources(a)) < len(study.sources(arm)) and trials[a] == trials[arm]]
        )
    ]
    named = {name for arm, fewer, _ in matches for name in (arm, *fewer)}
    return matches if all(len(study.searches[a]) == len(study.arms[a]) > 1 for a in named) else []


def attended(study):
    for arm in study.dense():
        placebos = [a for a in study.arms if study.is_control(a) and "shuffled_attention" in study.sources(a)]
        placebos = [a for a in placebos if study.normalise(a) == study.normalise(arm)]
        if set(study.sources(arm)) <= {"attention", "terminal"} and placebos:
            yield arm, placebos, []


def critic(study):
    column = "explained_variance_mc"
    known = column in next(iter(study.path[study.sparse].values()))
    return np.mean(list(study.values(study.sparse, column if known else "explained_variance", None).values()))


def verdicts(folder, dataset="reviews"):
    """(claim, where) -> verdict, of every claim that the study asks of seeds."""
    study = Study(folder, dataset)
    questions = [(key, q, arms, where) for key, q, arms in asked(study) for where in ("equal updates", "equal KL")]
    cases = [((key, where), case(study, *match, q, where)) for key, q, arms, where in questions for match in arms]
    level = 0.04 if study.seeds < 10 else 0.01
    differs, equal = holm([min(up, down) for _, (up, down, _) in cases]), holm([same for _, (*_, same) in cases])
    by_claim = {}
    for (name, (up, down, _)), p, same in zip(cases, differs, equal):
        direction = SUPPORTED if up < down else CONTRADICTED
        by_claim.setdefault(name, []).append(SAME if same < level else direction if p < level else UNDECIDED)
    return {name: denied(overall(arms)) if name[0] == "6" else overall(arms) for name, arms in by_claim.items()}


def overall(arms):
    if SUPPORTED in arms:
        return SUPPORTED
    return UNDECIDED if UNDECIDED in arms else CONTRADICTED if CONTRADICTED in arms else SAME


def denied(verdict):
    return {SUPPORTED: CONTRADICTED, UNDECIDED: UNDECIDED}.get(verdict, SUPPORTED)


def main(folder, dataset="reviews"):
    """Print both verdicts of every claim; the exit status is how many differ."""
    theirs = {}
    for path in Path(folder).glob("*09_verdicts/metrics.json"):
        theirs |= {(c["key"], c["where"]): c["verdict"] for c in json.loads(path.read_text())["claims"]}
    ours = verdicts(folder, dataset)
    for name, verdict in ours.items():
        mark = "" if theirs.get(name) == verdict else "   <- differs"
        print(f"{name[0]:3} {name[1]:14} {verdict:27} {theirs.get(name, 'not in notebook 09'):27}{mark}")
    return sum(theirs.get(name) != verdict for name, verdict in ours.items())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
