"""Graders of the user's own: Python in a sandbox or in process, or an HTTP server."""
