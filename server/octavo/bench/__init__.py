"""Benchmarks with vLLM's flags, labels and JSON keys. Measures any server, or an engine offline."""
