"""What to remove from an encoder: how much each part matters, and which parts go."""
