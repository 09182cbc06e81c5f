"""Parse, call one workflow, render. Help loads no torch."""
