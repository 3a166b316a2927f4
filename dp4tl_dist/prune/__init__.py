"""Voting for source classes, and choosing what to keep. Selecting is separate from voting, on the CPU, instant."""
