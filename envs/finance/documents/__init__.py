"""Documents as the tools show them, and the searches over them."""
