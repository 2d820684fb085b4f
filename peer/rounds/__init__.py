"""Rounds: how replicas of a shard agree on an average: pure machines, and the edge that carries them out."""
