"""Bytes and seconds before the start. Not built yet."""
