"""Reward shaping: from the credit of tokens to their rewards."""
