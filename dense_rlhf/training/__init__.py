"""The two loops: the inner one trains a policy, the outer one learns the shape of its rewards."""
