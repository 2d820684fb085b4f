"""The pipeline: microbatches that travel over the spans of several peers, there and back."""
