"""Policy-gradient losses: what each is given, the formulas, and the register by which a config names them."""
