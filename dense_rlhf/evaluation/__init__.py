"""Judges, benchmarks, findings and claims."""
