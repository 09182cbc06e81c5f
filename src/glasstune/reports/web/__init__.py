"""Self-contained HTML pages: templates, one style, small scripts."""
