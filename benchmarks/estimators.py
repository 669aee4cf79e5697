"""Error of Shapley values for the same evaluations: ours, shapiq's and shap's estimators. One JSON object a line.

    python benchmarks/estimators.py tables FOLDER          scores of all coalitions of real responses, once
    python benchmarks/estimators.py peers FOLDER           shapiq's values; in an environment of its own, python >= 3.12
    python benchmarks/estimators.py FOLDER >> benchmarks/attribution.jsonl

Four reward models: the reviews proxy; a small BERT and a small GPT-2, trained as it is; SmolLM2-135M with a head
trained on reviews, the weights of its trunk as they were. The responses are the middle of real reviews; their exact
values come from all 2^k coalitions, in which every estimator looks up what it asks for. Our constants and our shells of
coalitions were chosen on other responses to the proxy, to the BERT and to SmolLM2, on none to the GPT-2.

    error     10 or 12 tokens, 2, 4, 8 and 16 evaluations a token: median over responses and seeds of |values - exact|
              over |exact|, with a 95 % bootstrap interval over responses, and mean rank correlation
    coverage  share of exact values in our 95 % intervals, of all tokens and of the one with the largest credit, 200
              responses of 5 to 12 tokens (SmolLM2: 60 of 5 to 8) to each model, without those of which all coalitions
              are asked, and 20 of 16; and of our settled ranks that are right; from as many coalitions as `explain`
              takes, so many a token and the two ends
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from itertools import product
from pathlib import Path

import numpy as np

SEEDS, BUDGETS = 2, (2, 4, 8, 16)
LONG = {"reviews": (12, 20), "bert": (12, 20), "gpt2": (12, 20), "smollm2": (10, 20)}  # tokens, responses: for errors
COVERED = dict.fromkeys(LONG, [(range(5, 13), 25), ([16], 20)]) | {"smollm2": [(range(5, 9), 15)]}  # tokens, responses
CHOSEN_ON = 260  # responses from the start, on which our constants were chosen; they are not used here

# ---------------------------------------------------------------------------------------------------- tables


def masks_of(k: int) -> np.ndarray:
    """All coalitions (2^k, k); bit i of a row's number is player i."""
    return (np.arange(2**k)[:, None] >> np.arange(k) & 1).astype(bool)


def encoded(tokenizer, examples: list) -> tuple[list[np.ndarray], np.ndarray]:
    """The ids of the first words of labelled reviews, and the labels."""
    ids = tokenizer([example.text[:600] for example in examples], add_special_tokens=False)["input_ids"]
    return [np.array(row) for row in ids], np.array([example.label for example in examples], dtype=float)


def snippet(ids: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A random part that lacks up to 60 % of its tokens, as the proxy is trained on."""
    start = rng.integers(0, max(1, len(ids) - tokens))
    ids = ids[start : start + tokens]
    return ids[rng.random(len(ids)) > 0.6 * rng.random()]


def with_head(reward_model, examples: list):
    """The head by ridge regression of labels on the last state of a frozen trunk; its accuracy on a fifth kept out."""
    import torch

    (every, labels), rng = encoded(reward_model.tokenizer, examples), np.random.default_rng(0)
    rows, model = [snippet(ids, 24, rng) for ids in every], reward_model.model
    with torch.no_grad():
        ends = [torch.tensor([[*row, model.config.eos_token_id]]) for row in rows]
        states = torch.cat([model.base_model(row).last_hidden_state[:, -1] for row in ends])
        scale, y, n = states.std(0), torch.tensor(labels).float() - 0.5, len(rows) * 4 // 5
        X = (states - states.mean(0)) / scale
        ridge = X[:n].T @ X[:n] + 300 * torch.eye(X.shape[1])
        head = torch.linalg.solve(ridge, X[:n].T @ y[:n])
        right = float(((X[n:] @ head > 0) == (y[n:] > 0)).float().mean())
        model.score.weight.copy_(4 * (head / scale)[None])
    print(json.dumps({"benchmark": "attribution/head", "case": "smollm2", "held-out accuracy": round(right, 3)}))
    return reward_model


def trained(config, tokenizer, examples: list, steps: int = 300):
    """A classifier of two layers, trained from scratch on the labels of snippets."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from dense_rlhf.models.reward_model import RewardModel

    torch.manual_seed(0)
    pad = config.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    optimiser, right = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    (every, labels), rng = encoded(tokenizer, examples), np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.integers(0, len(every), 48)
        rows = [snippet(every[i], 40, rng) for i in chosen]
        ids = torch.full((len(rows), max(map(len, rows)) or 1), pad)
        for line, row in zip(ids, rows):
            line[: len(row)] = torch.from_numpy(row)
        scores, y = model(ids, attention_mask=(ids != pad).long()).logits[:, 0], torch.tensor(labels[chosen]).float()
        right.append(float(((scores > 0) == (y > 0.5)).float().mean()))
        optimiser.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(scores, y).backward()
        optimiser.step()
    fresh = round(float(np.mean(right[-50:])), 3)  # snippets are drawn anew each step
    case = config.model_type
    print(json.dumps({"benchmark": "attribution/head", "case": case, "accuracy of the last 50 steps": fresh}))
    return RewardModel(model.eval(), tokenizer, suffix=())


def tables(folder: Path) -> None:
    """Scores (N, 2^k) of every coalition, for each reward model and length."""
    import torch
    from attribution import cut_reviews, proxy, smollm2
    from transformers import BertConfig, GPT2Config

    from dense_rlhf.attribution.engine import coalition_scores
    from dense_rlhf.config.params import DataParams
    from dense_rlhf.data import load_data

    torch.set_num_threads(1)
    examples = load_data(DataParams()).reward
    order = np.random.default_rng(0).permutation(len(examples))
    many, tokenizer = [examples[i] for i in order[:2000]], proxy().tokenizer
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1)
    bert = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    gpt2 = dict(n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    makers = {
        "reviews": proxy,
        "bert": lambda: trained(BertConfig(**sizes, **bert), tokenizer, many),
        "gpt2": lambda: trained(GPT2Config(**sizes, **gpt2), tokenizer, many),
        "smollm2": lambda: with_head(smollm2(), [examples[i] for i in order[:250]]),
    }
    for name, make in makers.items():
        reward_model = make()
        wanted = [("coverage", k, number) for lengths, number in COVERED[name] for k in lengths]
        for kind, k, number in [*wanted, ("error", *LONG[name])]:
            skipped = CHOSEN_ON + (number * (k - 5) if kind == "coverage" else 0)
            readings = cut_reviews(12, k, skipped + number, reward_model.tokenizer)[skipped:]
            scores = [coalition_scores(reward_model, [one], [masks_of(k)])[0].double().numpy() for one in readings]
            np.save(folder / f"{name}_{kind}_{k}.npy", np.stack(scores))
            print(name, kind, k, len(scores), flush=True)


# ---------------------------------------------------------------------------------------------------- estimators


def lookup(table: np.ndarray):
    """The value function of a table, and the numbers of the coalitions that it was asked for."""
    bits, asked = 1 << np.arange(int(np.log2(len(table)))), set()

    def scores(coalitions: np.ndarray) -> np.ndarray:
        rows = np.asarray(coalitions).astype(bool) @ bits
        asked.update(rows.tolist())
        return table[rows]

    return scores, asked


def peers(folder: Path) -> None:
    """shapiq's values (N, seeds, budgets, k) of each table of the longer responses, and the evaluations it made."""
    from shapiq.approximator import KernelSHAP, LeverageSHAP, OddSHAP, RegressionMSR

    makers = {
        "shapiq KernelSHAP": KernelSHAP,
        "shapiq LeverageSHAP": LeverageSHAP,
        "shapiq RegressionMSR, linear": lambda **o: RegressionMSR(index="SV", proxy_model="linear", **o),
        "shapiq OddSHAP": OddSHAP,
    }
    for name, (k, _) in LONG.items():
        every, made = np.load(folder / f"{name}_error_{k}.npy"), {}
        for method, make in makers.items():
            values = np.full((len(every), SEEDS, len(BUDGETS), k), np.nan)
            for (n, table), seed, (b, each) in [
                (row, seed, budget)
                for row in enumerate(every)
                for seed in range(SEEDS)
                for budget in enumerate(BUDGETS)
            ]:
                scores, asked = lookup(table)
                result = make(n=k, random_state=seed).approximate(each * k, scores)
                values[n, seed, b] = result.get_n_order_values(1)
                assert len(asked) <= each * k + 2, (method, each, len(asked))
            made[method] = values
        np.savez(folder / f"peers_{name}.npz", **made)


def ours(table: np.ndarray, each: int, seed: int) -> dict[str, np.ndarray]:
    """Credit (k,) of a table by each of our estimators at a budget; of two a token, what is at most that."""
    from dense_rlhf.attribution import coalitions
    from dense_rlhf.attribution.gaussian import drawn

    k = int(np.log2(len(table)))
    bits, made = 1 << np.arange(k), drawn(k, each * k - 2, seed)
    designs = {"shap": coalitions.permutation_shap(k, each // 2, seed)}  # shap's own numbers
    designs |= {"leverage": coalitions.leverage_shap(k, each * k - 2, seed)}
    designs |= {"kernel": coalitions.kernel_shap(k, each * k - 2, seed)}
    linear = {name: one.operator.numpy() @ table[one.masks.numpy() @ bits] for name, one in designs.items()}
    return {"gaussian": made(table[made.masks @ bits]).credit} | linear


def shapley(tables: np.ndarray) -> np.ndarray:
    """Exact values (N, k) of tables (N, 2^k)."""
    k = int(np.log2(tables.shape[1]))
    rows, sizes, values = np.arange(2**k), masks_of(k).sum(1), np.zeros((len(tables), k))
    weight = np.array([math.factorial(s) * math.factorial(k - s - 1) / math.factorial(k) for s in range(k)])
    for i in range(k):
        without = rows[~masks_of(k)[:, i]]
        values[:, i] = (tables[:, without | 1 << i] - tables[:, without]) @ weight[sizes[without]]
    return values


def error_lines(name: str, folder: Path) -> None:
    """A line for each estimator and budget."""
    from scipy.stats import spearmanr

    k = LONG[name][0]
    every = np.load(folder / f"{name}_error_{k}.npy")
    exact = shapley(every)
    values = dict(np.load(folder / f"peers_{name}.npz"))
    cells = product(enumerate(every), enumerate(BUDGETS), range(SEEDS))
    for (n, table), (b, each), seed in cells:
        for method, credit in ours(table, each, seed).items():
            values.setdefault(method, np.zeros((len(every), SEEDS, len(BUDGETS), k)))[n, seed, b] = credit
    scale = np.linalg.norm(exact, axis=1)[:, None, None]
    errors = {one: np.linalg.norm(v - exact[:, None, None], axis=-1) / scale for one, v in values.items()}
    draws = np.random.default_rng(0).integers(0, len(every), (2000, len(every)))
    for b, each in enumerate(BUDGETS):
        for method in sorted(values, key=lambda one: np.median(errors[one][..., b])):
            resampled = np.median(errors[method][draws, :, b], axis=(1, 2))
            ranks = [
                spearmanr(v, x).statistic for row, x in zip(values[method][:, :, b], exact) for v in row if v.any()
            ]
            emit(
                "error",
                f"{name}, {k} tokens, {len(every)} responses, {SEEDS} seeds",
                method=method,
                evaluations_a_token=each,
                error=float(np.median(errors[method][..., b])),
                interval=[float(end) for end in np.quantile(resampled, [0.025, 0.975])],
                rank=float(np.mean(ranks)) if ranks else None,
            )


def coverage_lines(name: str, lengths: range | list[int], folder: Path) -> None:
    """A line for each budget."""
    from dense_rlhf.attribution.gaussian import drawn, inherited

    for each in BUDGETS:
        inside, largest, right, settled, alike = [], [], [], [], []
        for k in [k for k in lengths if each * k + 2 < 2**k]:
            every = np.load(folder / f"{name}_coverage_{k}.npy")
            exact, bits = shapley(every), 1 << np.arange(k)
            for n, (table, truth) in enumerate(zip(every, exact)):
                made = drawn(k, each * k, n % 5)
                result = made(table[made.masks @ bits])
                wrong, top = np.abs(result.credit - truth), np.abs(result.credit).argmax()
                inside.append(np.mean(wrong <= result.half_width))
                largest.append(wrong[top] <= result.half_width[top])
                even = result.half_width / np.sqrt(np.diag(inherited(result.credit)))
                alike.append((np.mean(wrong <= even), wrong[top] <= even[top]))
                first = [np.argsort(-np.abs(v), kind="stable")[: result.settled] for v in (result.credit, truth)]
                right += [np.array_equal(*first)] if result.settled else []
                settled.append(result.settled)
        draws = np.random.default_rng(0).choice(inside, (2000, len(inside))).mean(1)
        emit(
            "coverage",
            f"{name}, {' to '.join(map(str, sorted({lengths[0], lengths[-1]})))} tokens, {len(inside)} responses",
            evaluations_a_token=each,
            coverage=float(np.mean(inside)),
            interval=[float(end) for end in np.quantile(draws, [0.025, 0.975])],
            of_the_largest=float(np.mean(largest)),
            without_heredity=[float(share) for share in np.mean(alike, axis=0)],
            settled=float(np.mean(settled)),
            settled_right=float(np.mean(right)) if right else None,
        )


def emit(measure: str, case: str, **numbers) -> None:
    """One line, rounded."""
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 4))
    print(json.dumps(dict(benchmark=f"attribution/{measure}", case=case) | rounded), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=("tables", "peers", "compare"), default="compare")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.stage != "compare":
        return {"tables": tables, "peers": peers}[arguments.stage](arguments.folder)
    from dense_rlhf.runs import provenance

    print(
        json.dumps({"benchmark": "attribution/run", "script": "benchmarks/estimators.py", **provenance()}), flush=True
    )
    for name in LONG:
        error_lines(name, arguments.folder)
        for lengths, _ in COVERED[name]:
            coverage_lines(name, lengths, arguments.folder)


if __name__ == "__main__":
    main()
