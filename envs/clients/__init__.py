"""How servers of others are asked."""
