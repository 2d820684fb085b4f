"""The volunteer's program, and the researcher's: everything that talks to peers."""
