"""A model's tree at several precisions, from its config alone or from a live module."""
