"""Explain any Hugging Face reward model: which tokens of a response earned its score.

    python examples/explain_a_reward_model.py MODEL "What is the capital of France?" "Paris, I think."

MODEL is a hub id or a folder: a sequence classifier with one output, decoder or encoder. A list of `{role, content}` in
place of the prompt goes through the tokenizer's chat template.
"""

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dense_rlhf.attribution.explain import Explanation, explain


def main(name: str, prompt: str, response: str) -> Explanation:
    model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    explanation = explain(model, tokenizer, prompt, response)  # a notebook shows a heat-map and a table
    print(explanation)
    words = explain(model, tokenizer, prompt, response, source="leave_one_out", players="words")
    print("\nWhat the score loses without each word:", words, sep="\n")
    return explanation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompt", "response"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    main(arguments.model, arguments.prompt, arguments.response)
