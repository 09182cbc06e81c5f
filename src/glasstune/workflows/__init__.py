"""One function a command: config in, record out; this is the Python API."""
