"""What people read of a run, of a comparison and of a preflight."""
