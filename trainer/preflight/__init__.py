"""Is a run worth its hours, and what will it take: by some rollouts of the starting policy, or by formula alone."""
