"""Facts per architecture, and how each keeps the documents of a packed row apart."""
