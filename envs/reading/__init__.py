"""What a user wrote, read: files, rows, JSON, and the variables in it."""
