"""The style `full`: long generated reports with drafts and press releases among them, and questions about them."""
