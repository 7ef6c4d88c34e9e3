"""Episodes: who plays them, when they are admitted, how they are graded and collected."""
