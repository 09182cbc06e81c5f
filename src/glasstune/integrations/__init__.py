"""What brings the audit to `transformers.Trainer` and TRL: a callback and a loss of named terms."""
