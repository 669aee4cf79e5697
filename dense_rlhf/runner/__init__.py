"""Run a study: a plan of notebook runs, and their execution here or on a cluster."""
