"""The engine: exactly the numbers of one text at a time, whatever is shared between coalitions."""

import numpy as np
import pytest
import torch
from conftest import jitter
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dense_rlhf.attribution import engine
from dense_rlhf.attribution.coalitions import permutation_shap, ridge_lime
from dense_rlhf.attribution.engine import coalition_scores, is_packed, visible
from dense_rlhf.attribution.packing import pack
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import REMOVALS, InputError, Reading

VOCABULARY = 50
DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def random_model(seed, kind="llama", dtype=torch.float64, **options):
    """A tiny decoder of random size with one output that does read its input."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4]))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 24,
        "num_labels": 1,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "head_dim": 8,
        "num_key_value_heads": int(rng.choice([h for h in (1, 2, 4) if heads % h == 0])),
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = DECODERS[kind](**sizes, **options)
    model = AutoModelForSequenceClassification.from_config(config)
    return jitter(model, seed, scale=0.4).to(dtype)


class Tokens:
    """A tokenizer of one word."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text, **_):
        return {"input_ids": [17] * len(text.split())}


def reward_model_of(model, **options):
    return RewardModel(model, Tokens(), **options)


def random_readings(seed, sizes):
    """One reading for each (prompt, response) length."""
    rng = np.random.default_rng(seed)
    draw = lambda n: tuple(rng.integers(2, VOCABULARY, n).tolist())  # noqa: E731
    return [Reading(draw(P), draw(k)) for P, k in sizes]


def random_masks(seed, readings, m=9):
    rng = np.random.default_rng(seed)
    return [rng.random((m, len(reading.response))) < rng.random((m, 1)) for reading in readings]


@torch.no_grad()
def one_by_one(reward_model, reading, mask, removal):
    """The classifier's own forward on each coalition alone, without padding, batching or cache."""
    scores, P = [], len(reading.prompt)
    for keep in mask:
        if removal == "drop":
            ids = [t for t, k in zip(reading.response, keep) if k]
        else:
            ids = [t if k or removal == "attention_mask" else 17 for t, k in zip(reading.response, keep)]
        ids = torch.tensor([[*reading.prompt, *ids, *reward_model.suffix]])
        seen = torch.ones_like(ids)
        if removal == "attention_mask":
            seen[0, P : P + len(keep)] = torch.tensor(keep)
        hidden = reward_model.model.base_model(input_ids=ids, attention_mask=seen).last_hidden_state
        scores.append(reward_model.model.score(hidden[0, -1]).item())
    return torch.tensor(scores, dtype=torch.float64)


def close(ours, wanted, relative=1e-6):
    scale = max(wanted.abs().max().item(), 1e-3)
    return (ours.double().cpu() - wanted.cpu()).abs().max().item() <= relative * scale


# ---------------------------------------------------------------------------------------------------- packs


def sees_of(one):
    """Which nodes each node of a pack sees (N, N)."""
    path, owner, column = (torch.from_numpy(x[None].astype(int)) for x in (one.path, one.owner, one.column))
    return visible(path, owner, column)[0].numpy()


@given(st.data(), st.sampled_from(REMOVALS), st.integers(1, 40), st.integers(1, 3))
def test_packs_hold_every_coalition_once_and_each_sees_just_its_own_past(data, removal, nodes, suffix):
    k = data.draw(st.integers(0, 9))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=12))
    masks = np.array(rows, bool).reshape(len(rows), k)
    packs = pack(masks, suffix, removal, nodes)
    assert sorted(np.concatenate([one.coalition for one in packs]).tolist()) == list(range(len(masks)))
    for one in packs:
        assert len(one) <= nodes or len(one.coalition) == 1
        sees = sees_of(one)
        for read, row in zip(one.read, one.coalition):
            keep = np.concatenate([masks[row], np.ones(suffix, bool)])
            past = sees[read]
            columns = np.flatnonzero(keep) if removal != "replace" else np.arange(k + suffix)
            assert one.column[past].tolist() == columns.tolist()
            assert one.position[past].tolist() == (list(range(len(columns))) if removal == "drop" else columns.tolist())
            if removal == "replace":
                assert one.absent[past].tolist() == (~keep).tolist()
            for place, node in enumerate(np.flatnonzero(past)):  # and every node on the way sees the nodes before it
                assert np.flatnonzero(sees[node]).tolist() == np.flatnonzero(past)[: place + 1].tolist()


def test_packs_share_prefixes():
    masks = permutation_shap(24, 1, 0).masks.numpy()
    nodes = sum(map(len, pack(masks, 1, "drop", 10**6)))
    assert nodes < 0.6 * (masks.sum() + len(masks))  # kept tokens and a suffix, each coalition by itself
    assert sum(map(len, pack(masks, 1, "drop", 128))) < 1.1 * nodes


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_one_text_at_a_time(seed):
    """20 random reward models, four architectures, prompts of 0 to 20 and responses of 0 to 64 tokens in one batch."""
    rng, kind = np.random.default_rng(seed), list(DECODERS)[seed % 4]
    reward_model = reward_model_of(
        random_model(seed, kind), suffix=(1,) * int(rng.integers(1, 3)), token_budget=int(rng.choice([50, 400, 4096]))
    )
    readings = random_readings(seed, [(0, 3), (20, 64), (5, 1), (3, 0), *rng.integers(0, 20, (3, 2)).tolist()])
    masks = random_masks(seed, readings)
    assert is_packed(reward_model, readings)
    for removal in REMOVALS:
        kind = removal if removal != "replace" else "replace:w"
        ours = coalition_scores(reward_model, readings, masks, kind)
        for reading, mask, found in zip(readings, masks, ours):
            assert close(found, one_by_one(reward_model, reading, mask, removal), 1e-9), (removal, reading)


@pytest.mark.parametrize("seed", range(20))
def test_values_are_those_of_shap_and_lime(seed):
    """20 random reward models, lengths 1 to 64: equal to 1e-6 relative on the same coalitions."""
    import shap
    from lime.lime_base import LimeBase

    k = [1, 2, 3, 64, 33][seed] if seed < 5 else int(np.random.default_rng(seed).integers(1, 33))
    reward_model = reward_model_of(random_model(seed, list(DECODERS)[seed % 4]))
    (reading,) = readings = random_readings(seed, [(seed % 7, k)])
    f = lambda bits: one_by_one(reward_model, reading, np.asarray(bits) > 0.5, "drop").numpy()  # noqa: E731
    design = permutation_shap(k, 1, seed)
    ours = design.operator @ coalition_scores(reward_model, readings, [design.masks.numpy()])[0].cpu()
    explainer = shap.PermutationExplainer(f, shap.maskers.Independent(np.zeros((1, k))), seed=seed)
    theirs = explainer(np.ones((1, k)), max_evals=2 * k + 1, silent=True).values[0]
    assert close(ours, torch.tensor(theirs))

    design = ridge_lime(k, 30, seed)
    scores = coalition_scores(reward_model, readings, [design.masks.numpy()])[0].cpu()
    rng = np.random.RandomState(seed)  # lime's own draws: sizes of removal, then the removed
    sizes, bits = rng.randint(1, k + 1, 29), np.ones((30, k))
    for row, size in enumerate(sizes, 1):
        bits[row, rng.choice(range(k), size, replace=False)] = 0
    base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 25**2)), random_state=np.random.RandomState(0))
    distances = 100 * (1 - np.sqrt(bits.mean(1)))
    found = base.explain_instance_with_data(bits, f(bits)[:, None], distances, 0, k, feature_selection="none")[1]
    assert close(design.operator @ scores, torch.tensor([weight for _, weight in sorted(found)]))


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("suffix", [(0,), (0, 0), (7, 0), ()])
@pytest.mark.parametrize("seed", range(4))
def test_an_end_that_is_padding_is_passed_over_as_the_model_passes_it(seed, suffix, removal):
    """Each coalition is then read at its own last token; prefixes are shared all the same."""
    model = random_model(seed, list(DECODERS)[seed])
    reward_model = reward_model_of(model, suffix=suffix, token_budget=300)
    readings = random_readings(seed, [(20, 12), (5, 1), (3, 0), (1, 7)])
    masks = random_masks(seed, readings)
    assert is_packed(reward_model, readings, removal) == (removal == "drop" or 7 in suffix)
    scores = coalition_scores(reward_model, readings, masks, removal if removal != "replace" else "replace:w")
    for reading, mask, ours in zip(readings, masks, scores):
        for keep, score in zip(mask, ours):
            ids = [*reading.prompt, *reading.response, *suffix]
            kept = [*[True] * len(reading.prompt), *keep, *[True] * len(suffix)]
            if removal == "drop":
                ids, kept = [x for x, k in zip(ids, kept) if k], [True] * (sum(kept))
            if removal == "replace":
                ids, kept = [x if k else 17 for x, k in zip(ids, kept)], [True] * len(ids)
            own = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([kept]).long()).logits
            assert score.item() == pytest.approx(own.item(), abs=1e-9)


def test_another_decoder_and_a_short_window_are_batched_plainly_with_the_same_numbers():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0)
    gpt2 = jitter(AutoModelForSequenceClassification.from_config(config), 0, 0.4).double()
    windowed = random_model(1, "mistral", sliding_window=4)
    readings = random_readings(0, [(3, 6), (0, 9), (4, 0)])
    for model in (gpt2, windowed):
        reward_model = reward_model_of(model)
        assert not is_packed(reward_model, readings)
        for removal in REMOVALS[:2]:
            masks = random_masks(0, readings)
            ours = coalition_scores(reward_model, readings, masks, removal)
            for reading, mask, found in zip(readings, masks, ours):
                assert close(found, one_by_one(reward_model, reading, mask, removal), 1e-9)
    assert is_packed(reward_model_of(windowed), [Reading((3,), (4, 5))])


def test_offset_and_scale():
    model, readings = random_model(0), random_readings(0, [(2, 5)])
    masks = random_masks(0, readings)
    raw, scaled = (
        coalition_scores(reward_model_of(model, offset=o, scale=s), readings, masks)[0]
        for o, s in ((0.0, 1.0), (0.3, 2.0))
    )
    assert torch.allclose(scaled, (raw - 0.3) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_low_precision_weights_are_float32_and_near(dtype):
    exact, low = (reward_model_of(random_model(3, dtype=d)) for d in (torch.float64, dtype))
    readings = random_readings(3, [(6, 12), (2, 7)])
    masks = random_masks(3, readings)
    ours, wanted = (torch.cat(coalition_scores(model, readings, masks)) for model in (low, exact))
    assert ours.dtype == torch.float32
    assert close(ours, wanted, 1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_gives_the_same_scores():
    readings = random_readings(3, [(6, 12), (2, 7)])
    masks = random_masks(3, readings)
    wanted, ours = (
        torch.cat(
            coalition_scores(reward_model_of(random_model(3, dtype=torch.float32).to(device)), readings, masks)
        ).cpu()
        for device in ("cpu", "cuda")
    )
    assert torch.allclose(ours, wanted, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- cost


def traffic(model, readings, masks, **options):
    """Shapes that pass the embeddings and the last layer's MLP while coalitions are scored."""
    seen, reward_model = {"tokens": [], "last": []}, reward_model_of(model, **options)
    assert reward_model.has_head  # asked before the passes are counted
    hooks = [
        model.base_model.embed_tokens.register_forward_hook(lambda _, a, __: seen["tokens"].append(a[0].shape)),
        model.base_model.layers[-1].mlp.register_forward_hook(lambda _, a, __: seen["last"].append(a[0].shape)),
    ]
    coalition_scores(reward_model, readings, masks)
    for hook in hooks:
        hook.remove()
    return seen


def test_prompts_pass_once_and_the_last_layer_only_where_scores_are_read():
    model, readings = random_model(0), random_readings(0, [(40, 16)] * 3)
    masks = [permutation_shap(16, 1, 0).masks.numpy()] * 3
    seen = traffic(model, readings, masks)
    tokens, read = (sum(a * b for a, b, *_ in seen[name]) for name in ("tokens", "last"))
    packs = pack(masks[0], 1, "drop", 160)
    assert tokens == 3 * 40 + 3 * len(packs) * max(map(len, packs)) < 3 * (40 + 1.05 * sum(map(len, packs)))
    assert 3 * len(masks[0]) <= read < 1.5 * 3 * len(masks[0])  # packs of one batch are padded to a common number


def test_packs_of_a_whole_batch_are_small():
    """They are kept for all responses at once: nothing in them grows with the square of their nodes."""
    masks = permutation_shap(128, 2, 0).masks.numpy()
    packs = pack(masks, 1, "drop", 384)
    held = sum(array.nbytes for one in packs for array in vars(one).values())
    assert held <= 16 * sum(map(len, packs)) + 4 * len(masks) * 129 + 24 * len(masks)
    assert held < sum(len(one) ** 2 for one in packs) / 4  # bytes of who sees whom


@pytest.mark.parametrize("budget", [1, 60, 300, 5000])
def test_no_batch_exceeds_the_token_budget_unless_it_is_one_row(budget):
    model, readings = random_model(2), random_readings(2, [(P, k) for P in (0, 3, 9) for k in (1, 8, 20)])
    masks = random_masks(2, readings, m=20)
    for rows, width in traffic(model, readings, masks, token_budget=budget)["tokens"]:
        assert rows * width <= budget or rows == 1


def test_progress_sees_every_batch_and_may_cancel():
    model, readings = random_model(0), random_readings(0, [(3, 8)] * 5)
    masks, counted = random_masks(0, readings), []

    def count(batches):
        counted.append(len(batches))
        return iter(batches)

    def cancel(batches):
        yield batches[0]
        raise KeyboardInterrupt

    reward_model = reward_model_of(model, token_budget=100)
    coalition_scores(reward_model, readings, masks, progress=count)
    assert counted[0] > 1
    with pytest.raises(KeyboardInterrupt):
        coalition_scores(reward_model, readings, masks, progress=cancel)
    assert "forward" not in vars(model.base_model.layers[-1])  # the model is as it was


def test_a_failing_forward_leaves_the_model_as_it_was(monkeypatch):
    model, readings = random_model(0), random_readings(0, [(3, 8)])
    monkeypatch.setattr(model.base_model.layers[-1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        coalition_scores(reward_model_of(model), readings, random_masks(0, readings))
    assert "forward" not in vars(model.base_model.layers[-1])


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_its_response(bad):
    model, readings = random_model(0), random_readings(0, [(2, 3), (2, 4)])
    model.base_model.embed_tokens.weight.data[readings[1].response[2]] = bad
    with pytest.raises(InputError, match=r"the reward model gave (nan|-?inf) for a coalition of response 1"):
        coalition_scores(
            reward_model_of(model),
            readings[:1] + [Reading((), readings[1].response)],
            [np.ones((1, 3), bool), np.ones((1, 4), bool)],
        )


def test_masks_that_do_not_fit_raise():
    reward_model, readings = reward_model_of(random_model(0)), random_readings(0, [(2, 3)])
    for mask in (np.ones((1, 4), bool), np.ones((1, 3)), np.ones(3, bool)):
        with pytest.raises(InputError, match=r"masks\[0\] is .* wanted bool \(m, 3\)"):
            coalition_scores(reward_model, readings, [mask])
    assert coalition_scores(reward_model, [], []) == []


@pytest.mark.parametrize("removal", ["hide", "replace", "replace:", "drop:x", ""])
def test_an_unknown_removal_raises(removal):
    wanted = "wanted drop, attention_mask or replace:TOKEN"
    for model in (random_model(0), random_model(1, "mistral", sliding_window=2)):  # packed and plain
        with pytest.raises(InputError, match=wanted):
            coalition_scores(reward_model_of(model), random_readings(0, [(2, 3)]), [np.ones((1, 3), bool)], removal)
    with pytest.raises(InputError, match=wanted):
        AttributionParams(removal=removal)


def test_a_replacement_must_be_one_token(reward_model, tokenizer):
    readings = [Reading((3,), (4, 5))]
    with pytest.raises(InputError, match="'replace:the film' is .* tokens of the reward model, wanted exactly one"):
        coalition_scores(reward_model, readings, [np.ones((1, 2), bool)], "replace:the film")
    assert engine.coalition_scores(reward_model, readings, [np.zeros((1, 2), bool)], "replace:a")[0].isfinite().all()
