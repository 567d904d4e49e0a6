"""Looking at data before training on it: checked, seen, counted."""
