"""Financial questions over a generated corpus of company reports: the embedded default world."""
