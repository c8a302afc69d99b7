"""Making and loading models."""
