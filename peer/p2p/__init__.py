"""Peer to peer: calls, directory and content-addressed bytes over libp2p."""
