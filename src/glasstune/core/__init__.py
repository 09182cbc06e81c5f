"""Config, errors, findings, records and protocols. No torch at import, no other room."""
