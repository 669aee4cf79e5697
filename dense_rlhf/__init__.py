"""Which tokens earned the reward? Explainable dense reward shapes for RLHF (after arXiv 2504.16272).

reward model -> explainers -> normalise + mix (weights w) -> PPO -> validation reward -> Bayesian optimisation of w
"""

__version__ = "0.20.0"
