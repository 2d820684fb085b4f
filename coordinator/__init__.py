"""The organizer's program: admits peers, records progress, publishes checkpoints. Never in the training path."""
