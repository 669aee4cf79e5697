"""The two loops: train a policy, learn the shape."""
