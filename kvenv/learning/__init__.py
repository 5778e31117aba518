"""From traces to scorers."""
