"""A run's folder as a screen, while the run is at work: what is read of it, and how it is shown."""
