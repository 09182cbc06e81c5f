"""Bytes and seconds before the start.

Import the modules; this package must stay light.
"""
