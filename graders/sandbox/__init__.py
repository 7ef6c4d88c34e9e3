"""A sandbox for Python source that nobody here has read: see docs/sandbox.md for what it holds and what it does not."""
