"""Tasks: read, ordered, chosen; the tools that a task offers; the expert's episodes."""
