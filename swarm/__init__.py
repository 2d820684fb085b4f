"""Shared domain of swarmtrain: words, rules, maths. No sockets, no clock, no torch at import time."""

__version__ = "0.1.0"
