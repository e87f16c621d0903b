"""Measure: parameters, bytes, FLOPs, memory, perplexity, speed."""
