"""The training loop, what it minimises (tasks), what runs it (engines) and what it saves (checkpoints)."""
