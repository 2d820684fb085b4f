"""Checkpoints: made, served, published, downloaded, verified, used."""
