"""Terminal and metric sinks, from records and events alone."""
