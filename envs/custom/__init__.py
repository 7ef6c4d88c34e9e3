"""The user's own environments and tools, as they are."""
