"""Callback and term loss for other trainers. Not built yet."""
