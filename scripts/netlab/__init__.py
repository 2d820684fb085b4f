"""A network laboratory: peers in namespaces of their own, joined by links of a chosen rate, delay, jitter and loss."""
