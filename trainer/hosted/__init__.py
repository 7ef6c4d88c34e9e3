"""Jobs of the hosted service, read as they are."""
