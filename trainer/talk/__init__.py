"""The trained agent as one talks to it: its policy, its tools, and a person in the place of the user."""
