"""Sources that look inside the reward model: equal to eager attention, one-by-one scores, autograd and captum."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS, RATIONALES, SENTENCES, jitter
from transformers import AutoConfig, AutoModelForSequenceClassification

from dense_rlhf.attribution import attribute, internals, removal
from dense_rlhf.config.params import AttributionParams, PPOParams, RewardParams, RunParams
from dense_rlhf.data import Dataset
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.models.word_judge import load_lexicon
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.training import dpo
from dense_rlhf.training.dpo import BATCH, Pairs, load_implicit
from dense_rlhf.training.task import load_task
from dense_rlhf.types import InputError, Reading

PARAMS = AttributionParams(ig_steps=8, rationale_path=RATIONALES)
INTERNAL = ("attention", "prefix", "gradient_input", "integrated_gradients", "lexicon", "rationale", "log_ratio")
DPO = RewardParams(dpo_steps=3, dpo_beta=0.5)


def explain(source, reward_model, rollout, params=PARAMS):
    return attribute(reward_model, rollout, [source], params)[source]


def scored(rollout, reward_model):
    """The same responses with this model's scores, in its precision."""
    return replace(rollout, scores=reward_model.score(reward_model.readings(rollout)))


def classifier(kind, vocabulary, kv_heads=2, seed=5, **options):
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_labels=1,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=4,
        pad_token_id=1,
        **options,
    )
    return jitter(AutoModelForSequenceClassification.from_config(config), seed, 0.4)


@pytest.fixture(scope="module")
def exact(tokenizer):
    """In double precision, with query heads that share key heads, off centre and off scale."""
    return RewardModel(classifier("llama", len(tokenizer)).double(), tokenizer, offset=0.3, scale=2.5)


@pytest.fixture(scope="module")
def alien(tokenizer):
    """A reward model with a vocabulary of its own."""
    own = train_tokenizer(SENTENCES[::-1] + ["rather tedious"], 270)
    return RewardModel(classifier("qwen3", len(own)).double(), own, policy_tokenizer=tokenizer)


class Additive(torch.nn.Module):
    """A score that is the sum of a linear function of the embeddings."""

    dtype, device, config = torch.float32, torch.device("cpu"), SimpleNamespace(model_type="additive")

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(vocabulary, 6), torch.nn.Linear(6, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, attention_mask, input_ids=None, inputs_embeds=None):
        embeddings = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return SimpleNamespace(logits=self.head((embeddings * attention_mask[..., None]).sum(1)))


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "kind, options",
    [("llama", {}), ("mistral", {"sliding_window": 5}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_attention_is_the_last_layer_of_eager(kind, options, kv_heads, tokenizer):
    model = classifier(kind, len(tokenizer), kv_heads, **options)
    readings = [Reading((5, 6, 7), (8, 9, 10, 11, 12, 13)), Reading((), (20, 21)), Reading((40,) * 9, (30, 31, 32))]
    reward_model = RewardModel(model, tokenizer, suffix=(3, 4), token_budget=40)
    attentions = internals.read_attention(reward_model, readings)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for reading, ours in zip(readings, attentions):
        ids = torch.tensor([[*reading.prompt, *reading.response, 3, 4]])
        row = eager(input_ids=ids, output_attentions=True).attentions[-1][0].mean(0)[-1]
        assert torch.allclose(ours, row[len(reading.prompt) : -2], atol=1e-6) and ours.std() > 1e-3


def test_attention_leaves_the_model_as_it_was_even_when_it_fails(exact, rollout, monkeypatch):
    before = exact.model.config._attn_implementation
    assert before == "sdpa"
    monkeypatch.setattr(internals, "sdpa_attention_forward", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain("attention", exact, rollout)
    assert exact.model.config._attn_implementation == exact.model.model.config._attn_implementation == before


def test_attention_of_an_unknown_kind_of_model_raises(tokenizer, rollout):
    with pytest.raises(InputError, match="type 'additive' is not read; take one of llama"):
        explain("attention", RewardModel(Additive(len(tokenizer)), tokenizer), rollout)


# ---------------------------------------------------------------------------------------------------- prefixes


def test_prefix_credit_is_the_change_of_the_score_token_by_token(exact, rollout):
    rollout = scored(rollout, exact)
    attribution, eos = explain("prefix", exact, rollout), exact.tokenizer.eos_token_id
    assert attribution.complete and attribution.gap.abs().max() < 1e-12 and attribution.credit.abs().max() > 0.01
    for row, reading in enumerate(exact.readings(rollout)):
        k = len(reading.response)
        texts = [[*reading.prompt, *reading.response[:t], eos] for t in range(k + 1)]
        alone = [exact.model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
        assert torch.allclose(attribution.credit[row, :k], torch.tensor(alone).double().diff() / 2.5, atol=1e-6)
        assert attribution.baseline[row].item() == pytest.approx((alone[0] - 0.3) / 2.5, abs=1e-9)
    assert attribution.evaluations == pytest.approx(rollout.players.sum(-1).float().mean().item() + 1)


# ---------------------------------------------------------------------------------------------------- gradients


def of_embeddings(reward_model, reading, start):
    """The score as a function of embeddings (b, L, H), the text's own, and those with `start` for the response."""
    embed = reward_model.model.get_input_embeddings()
    own = embed(torch.tensor([[*reading.prompt, *reading.response, *reward_model.suffix]])).detach()
    changed = own.clone()
    changed[:, internals._inside(reading)] = start
    return lambda x: reward_model.calibrate(reward_model.model(inputs_embeds=x).logits.squeeze(-1)), own, changed


def test_gradient_input_is_autograds_with_the_prompt_held(exact, rollout):
    rollout = scored(rollout, exact)
    attribution = explain("gradient_input", exact, rollout)
    for row, reading in enumerate(exact.readings(rollout)):
        f, own, zeroed = of_embeddings(exact, reading, 0.0)
        (gradient,) = torch.autograd.grad(f(own.requires_grad_()), own)
        wanted = (gradient * own).sum(-1)[0, internals._inside(reading)]
        assert torch.allclose(attribution.credit[row, : len(wanted)], wanted, atol=1e-9)
        assert attribution.baseline[row].item() == pytest.approx(f(zeroed).item(), abs=1e-9)
    assert not attribution.complete and attribution.gap.abs().max() > 0.01 and attribution.credit.abs().max() > 0.01
    assert all(p.grad is None for p in exact.model.parameters())


@pytest.mark.parametrize("source", ["gradient_input", "integrated_gradients"])
def test_gradients_of_a_linear_model_are_exact(source, tokenizer, rollout):
    reward_model = RewardModel(Additive(len(tokenizer)), tokenizer, scale=0.5)
    rollout, model = scored(rollout, reward_model), reward_model.model
    attribution = explain(source, reward_model, rollout, AttributionParams(ig_steps=1))
    assert attribution.gap.abs().max() < 1e-5
    eos = model.embedding.weight[tokenizer.eos_token_id] if source == "integrated_gradients" else 0
    wanted = ((model.embedding(rollout.responses) - eos) @ model.head.weight[0] / 0.5).masked_fill(~rollout.players, 0)
    assert torch.allclose(attribution.credit, wanted, atol=1e-5)


def test_integrated_gradients_are_captums(exact, rollout):
    captum = pytest.importorskip("captum.attr")
    rollout = scored(rollout, exact)
    attribution = explain("integrated_gradients", exact, rollout)
    eos = exact.model.get_input_embeddings().weight[exact.tokenizer.eos_token_id].detach()
    for row, reading in enumerate(exact.readings(rollout)):
        f, own, start = of_embeddings(exact, reading, eos)
        theirs = captum.IntegratedGradients(f).attribute(own, start, n_steps=8, method="gausslegendre").sum(-1)[0]
        assert torch.allclose(
            attribution.credit[row, : len(reading.response)], theirs[internals._inside(reading)], atol=1e-9
        )
        assert attribution.baseline[row].item() == pytest.approx(f(start).item(), abs=1e-9)
    assert attribution.credit.abs().max() > 0.01


def test_integrated_gradients_become_complete_with_steps(exact, rollout):
    rollout = scored(rollout, exact)
    attributions = [
        explain("integrated_gradients", exact, rollout, AttributionParams(ig_steps=n)) for n in (4, 16, 128)
    ]
    gaps = [one.gap.abs().max().item() for one in attributions]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] and gaps[2] < 1e-5, gaps
    explained = (rollout.players.any(-1)).float().mean().item()
    assert attributions[1].evaluations == pytest.approx(1 + 32 * explained) and not attributions[2].complete


@pytest.mark.parametrize("source", ["attention", "gradient_input", "integrated_gradients"])
def test_credit_does_not_depend_on_the_token_budget(source, exact, rollout):
    rollout = scored(rollout, exact)
    one, other = (explain(source, replace(exact, token_budget=b), rollout).credit for b in (1, 10**6))
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("source", ["attention", "prefix", "gradient_input", "integrated_gradients"])
def test_bfloat16_gives_about_the_same(source, exact, rollout):
    half = replace(exact, model=copy.deepcopy(exact.model).bfloat16())
    one, other = (explain(source, rm, scored(rollout, rm)).credit.float() for rm in (exact, half))
    assert other.isfinite().all()
    assert torch.corrcoef(torch.stack([one[rollout.players], other[rollout.players]]))[0, 1] > 0.98


# ---------------------------------------------------------------------------------------------------- not the model's


def test_the_lexicon_gives_each_word_its_valence(reward_model, rollout, tokenizer):
    ids = torch.tensor(tokenizer(" the film was good, the acting was awful")["input_ids"])[None]
    spoken = rollout.take(torch.tensor([0]))
    zeros = torch.zeros(ids.shape)
    spoken = replace(
        spoken,
        responses=ids,
        mask=zeros == 0,
        ended=torch.tensor([False]),
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
    )
    attribution, valence = explain("lexicon", reward_model, spoken), load_lexicon().weights
    assert attribution.credit.sum().item() == pytest.approx(valence["good"] + valence["awful"], abs=1e-5)
    assert (
        attribution.credit.max() > 0 > attribution.credit.min()
        and attribution.gap.isnan().all()
        and attribution.evaluations == 0
    )


def test_log_ratio_is_beta_times_the_difference_of_log_probabilities(reward_model, rollout, tokenizer):
    credit = explain("log_ratio", reward_model, rollout).credit
    policies = [p.lm for p in (reward_model.implicit.policy, reward_model.implicit.reference)]
    for row, reading in enumerate(reward_model.readings(rollout)):
        ids = torch.tensor([[*reading.prompt, *reading.response]])
        with torch.no_grad():
            logits = [p(input_ids=ids).logits[0, :-1] for p in policies]
        for one in logits:
            one[:, tokenizer.pad_token_id] = -torch.inf
        policy, reference = (one.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1) for one in logits)
        k = len(reading.response)
        assert torch.allclose(credit[row, :k], (0.1 * (policy - reference))[len(ids[0]) - 1 - k :], atol=1e-5)
        assert not credit[row, k:].any()


def test_log_ratio_without_a_policy_raises(reward_model, rollout):
    with pytest.raises(InputError, match="set reward.dpo_steps above 0"):
        explain("log_ratio", replace(reward_model, implicit=None), rollout)


# ---------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("source", INTERNAL)
def test_another_vocabulary_moves_credit_and_keeps_its_total(source, alien, reward_model, rollout, monkeypatch):
    alien = replace(alien, implicit=reward_model.implicit)
    rollout, totals = scored(rollout, alien), []
    assert any(len(r.response) != k for r, k in zip(alien.readings(rollout), rollout.players.sum(-1).tolist()))
    lay = removal.on_policy_tokens

    def remember(rollout, readings, credits):
        totals.extend(credit.sum().item() for credit in credits)
        return lay(rollout, readings, credits)

    for module in (internals, removal):
        monkeypatch.setattr(module, "on_policy_tokens", remember)
    attribution = explain(source, alien, rollout)
    assert attribution.credit.isfinite().all() and not attribution.credit[~rollout.mask].any()
    if source in ("prefix", "gradient_input", "integrated_gradients"):
        assert attribution.credit.sum(-1).tolist() == pytest.approx(totals, abs=1e-9)
    if attribution.complete:
        assert (attribution.credit.sum(-1) + attribution.baseline).tolist() == pytest.approx(
            rollout.scores.tolist(), abs=1e-5
        )
    if source == "lexicon":
        texts = response_texts(rollout, alien.policy_tokenizer)
        assert attribution.credit.sum(-1).tolist() == pytest.approx([load_lexicon().score(t) for t in texts], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- DPO


def test_preferences_are_the_reward_models_and_keep_the_tokens(reference, reward_model, tokenizer):
    pairs = Pairs(reference, reward_model, tokenizer, max_new_tokens=6)
    rows = pairs.preferences(PROMPTS, 20)
    assert 12 < len(rows) <= 24 and rows == pairs.preferences(PROMPTS, 20)
    prompts = {tuple(ids) for ids in tokenizer(PROMPTS)["input_ids"]}
    for row in rows:
        sides = [row[side] for side in ("chosen_ids", "rejected_ids")]
        assert tuple(row["prompt_ids"]) in prompts
        assert all(side[-1] == tokenizer.eos_token_id or len(side) == 6 for side in sides)
        bare = [[t for t in side if t != tokenizer.eos_token_id] for side in sides]
        better, worse = reward_model.score([Reading(tuple(row["prompt_ids"]), tuple(side)) for side in bare])
        assert better > worse


def test_dpo_teaches_a_copy_and_is_cached(reference, reward_model, rollout, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    before = copy.deepcopy(reference.lm.state_dict())
    pairs = Pairs(reference, reward_model, tokenizer, max_new_tokens=6)
    made = load_implicit(pairs, PROMPTS, DPO)
    assert all(torch.equal(before[name], weight) for name, weight in reference.lm.state_dict().items())
    assert not any(p.requires_grad for p in made.policy.parameters()) and not made.policy.training
    ratio = made(rollout)
    assert ratio.shape == rollout.mask.shape and ratio.any() and not ratio[~rollout.players].any()
    assert not list(tmp_path.rglob("checkpoint*"))
    monkeypatch.setattr("dense_rlhf.training.dpo.train_dpo", lambda *args: pytest.fail("trained twice"))
    assert torch.equal(load_implicit(pairs, PROMPTS, DPO)(rollout), ratio)
    with pytest.raises(pytest.fail.Exception):
        load_implicit(pairs, PROMPTS, replace(DPO, dpo_beta=0.4))


def test_dpo_takes_its_loss_on_the_sampled_tokens(reference, reward_model, tokenizer, monkeypatch):
    """The first loss is log 2, and the policy then likes chosen responses more than rejected ones."""
    from trl import DPOTrainer

    seen, compute = [], DPOTrainer._compute_loss

    def remember(self, model, inputs, return_outputs):
        seen.append((inputs["input_ids"].tolist(), compute(self, model, inputs, False).item()))
        return compute(self, model, inputs, return_outputs)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", remember)
    rows = Pairs(reference, reward_model, tokenizer, max_new_tokens=6).preferences(PROMPTS, BATCH)
    dpo.train_dpo(reference.lm, rows, tokenizer, 2, 0.5, 0)
    wanted = {tuple(row["prompt_ids"] + row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")}
    pad = tokenizer.pad_token_id
    assert {tuple(t for t in ids if t != pad) for ids in seen[0][0]} <= wanted
    assert seen[0][1] == pytest.approx(0.6931, abs=1e-3) and seen[1][1] < seen[0][1]


def test_dpo_without_a_preference_raises(reference, tokenizer):
    with pytest.raises(InputError, match="the same score"):
        dpo.train_dpo(reference.lm, [], tokenizer, 2, 0.5, 0)


def test_load_task_teaches_only_where_it_is_asked(reference, reward_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    asked = []
    data = Dataset("made", "r0", [], [], PROMPTS * 4, [], [])
    monkeypatch.setattr("dense_rlhf.training.task.load_data", lambda params: data)
    shipped = SimpleNamespace(model=reference.lm, tokenizer=tokenizer, revision="p0")
    monkeypatch.setattr("dense_rlhf.training.task.load_policy", lambda params: shipped)
    monkeypatch.setattr(
        "dense_rlhf.training.task.load_reward_model", lambda *args, **options: replace(reward_model, implicit=None)
    )
    monkeypatch.setattr("dense_rlhf.training.task.load_gold_judge", lambda *args: SimpleNamespace(weights={}))
    monkeypatch.setattr(
        "dense_rlhf.training.task.load_implicit", lambda pairs, *_: asked.append(pairs.reward_model.scale) or len
    )
    params = RunParams(ppo=PPOParams(rollouts=6, minibatch=6, max_new_tokens=4))
    tasks = [load_task(replace(params, reward=reward)).reward_model for reward in (RewardParams(), DPO)]
    assert [one.implicit for one in tasks] == [None, len] and asked == [tasks[1].scale] and asked[0] != 1


def test_the_proxy_does_not_depend_on_dpo(tokenizer, tmp_path, monkeypatch):
    from dense_rlhf.models import train_reward_model
    from dense_rlhf.types import LabelledText

    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    texts = [LabelledText(text, i % 2) for i, text in enumerate(SENTENCES)]
    small = RewardParams(hidden=8, layers=1, heads=2, steps=2, batch=2)
    for params in (small, replace(small, dpo_steps=5, dpo_beta=0.3)):
        train_reward_model.load_reward_model(texts, tokenizer, params, "r0")
    assert len(list((tmp_path / "reward").glob("[!.]*"))) == 1


@pytest.mark.parametrize("values", [{"dpo_steps": -1}, {"dpo_beta": 0.0}])
def test_impossible_dpo_is_refused(values):
    with pytest.raises(InputError, match="wanted a whole number of at least 0|wanted a number above 0"):
        RewardParams(**values)
