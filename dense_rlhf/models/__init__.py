"""The policy with its value head, the reward model, the gold judge; text and tokens."""
