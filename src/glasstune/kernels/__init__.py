"""Operations: one folder each, with a plain reference, a fused version and a public door."""
