"""Bayesian optimisation of weights on the simplex, and its audit."""
