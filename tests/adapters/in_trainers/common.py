"""What the scripts here share. They run in the trainers' environment: a batch comes in, JSON, and numbers go out."""

import json
import sys
from importlib.metadata import version


def batch():
    """Prompt and response ids, token rewards and values of each response, settings."""
    return json.load(sys.stdin)


def token_rewards(given, kind):
    """A callable as the adapters want it: the rewards of `kind` by prompt and response."""
    rows = {key(*ids): row for *ids, row in zip(given["prompt_ids"], given["response_ids"], given[kind])}
    return lambda prompts, responses, *_: [rows[key(*ids)] for ids in zip(prompts, responses)]


def key(prompt, response):
    return tuple(prompt), tuple(response)


def answer(package, numbers):
    heavy = {"papermill", "botorch", "shap", "dense_rlhf.attribution"} & set(sys.modules)
    print("\n" + json.dumps({"version": version(package), "heavy": sorted(heavy)} | numbers))
