"""Is it still the method? Replays and statistics."""
