"""The style `brief`: short generated reports, and questions about them."""
