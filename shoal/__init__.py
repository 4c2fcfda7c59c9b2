"""Shoal: offline LLM inference on Ray."""
