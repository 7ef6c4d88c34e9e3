"""JSON schemas: what they say of a value, and the texts of docstrings that go into them."""
