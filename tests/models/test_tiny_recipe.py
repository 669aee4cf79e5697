"""The tiny language model's recipe."""

import math

import pytest
import torch
from conftest import SENTENCES
from torch.nn import functional as F

from dense_rlhf.config.params import PolicyParams
from dense_rlhf.files import file_sha256
from dense_rlhf.models import tiny_recipe as lm
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.types import InputError

PARAMS = lm.LanguageModelParams(vocabulary=300, hidden=16, layers=2, heads=2, context=8, batch=8, steps=30)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return lm.build_language_model(PARAMS, tokenizer)


def test_tokenizer_round_trips_any_text_and_adds_nothing(tokenizer):
    for text in ["the film", " two  spaces ", "naïve 日本 🙂\n"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and len(tokenizer) == 300


def test_stream_has_an_eos_before_each_text_and_at_the_end(tokenizer):
    stream = lm.token_stream(["a good film", "bad"], tokenizer)
    assert tokenizer.decode(stream) == "<eos>a good film<eos>bad<eos>"


def test_schedule_rises_to_one_and_falls_to_a_tenth():
    params = lm.LanguageModelParams(steps=100, warmup=0.1)
    rates = [lm._schedule(step, params) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[10] == pytest.approx(1)
    assert rates[100] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_held_out_loss_is_the_mean_over_whole_windows(model, tokenizer):
    stream = lm.token_stream(SENTENCES, tokenizer)[:30]  # three windows of 8, and a tail of 5
    losses = []
    for start in (0, 8, 16):
        with torch.no_grad():
            logits = model(input_ids=stream[None, start : start + 8]).logits[0]
        losses += [-F.log_softmax(row, -1)[token].item() for row, token in zip(logits, stream[start + 1 :])]
    assert len(losses) == 24
    assert lm.held_out_loss(model, stream, 8) == pytest.approx(sum(losses) / 24, abs=1e-5)


def test_held_out_loss_uses_every_window_that_fits(model, tokenizer):
    stream = lm.token_stream(SENTENCES, tokenizer)
    whole = lm.held_out_loss(model, stream[:25], 8)  # 24 predictions: exactly three windows
    assert whole == lm.held_out_loss(model, stream[:32], 8) != lm.held_out_loss(model, stream[:33], 8)


def test_a_fresh_model_knows_nothing_and_training_teaches_it(model, tokenizer):
    stream = lm.token_stream(SENTENCES * 3, tokenizer)
    before = lm.held_out_loss(model, stream, 8)
    assert before == pytest.approx(math.log(300), abs=0.1)
    losses = lm.train_language_model(model, stream, PARAMS, seed=0)
    assert len(losses) == 30 and losses[0] == pytest.approx(before, abs=0.2)
    assert lm.held_out_loss(model, stream, 8) < before - 1


def test_training_is_decided_by_its_seed(tokenizer):
    stream, losses = lm.token_stream(SENTENCES, tokenizer), []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        losses.append(lm.train_language_model(lm.build_language_model(PARAMS, tokenizer), stream, PARAMS, seed)[:5])
    assert losses[0] == losses[1] != losses[2]


def test_save_and_load_round_trip_in_half_precision(model, tokenizer, tmp_path):
    original = {name: p.clone() for name, p in model.state_dict().items()}
    returned = lm.save_language_model(model, tokenizer, {"seed": 0}, tmp_path)
    loaded = load_policy(PolicyParams(name=str(tmp_path)))
    for name, p in loaded.model.state_dict().items():
        assert torch.equal(p, original[name].half().float()) and torch.equal(p, returned.state_dict()[name]), name
        assert torch.equal(model.state_dict()[name], original[name]), name  # the model itself stays as it was
    text = "the film was good"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token == lm.PAD
    assert (tmp_path / "recipe.json").read_text() == '{\n "seed": 0\n}\n'
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 5000
    assert len(file_sha256(tmp_path / "model.safetensors")) == 64


def test_a_policy_that_is_nowhere_raises():
    with pytest.raises(InputError, match="policy.name.*nobody/no-such-model"):
        load_policy(PolicyParams(name="nobody/no-such-model"))
    with pytest.raises(InputError, match="float16"):
        load_policy(PolicyParams(dtype="float16"))
