"""What a run has before it and will take; nothing of it is run."""
