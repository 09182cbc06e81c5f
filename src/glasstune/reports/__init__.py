"""Terminal, web pages and metric sinks, from records and events alone."""
