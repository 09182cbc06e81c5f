"""Merge, certificate, GGUF. Not built yet."""
