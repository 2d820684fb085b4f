"""Training: a model in 8 bits, its inner steps, and what it learned since the anchor."""
