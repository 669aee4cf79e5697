"""The file that docs/trainers.md has a trainer load."""

from dense_rlhf.adapters.client import RewardClient

rewards = RewardClient("http://127.0.0.1:8700")
