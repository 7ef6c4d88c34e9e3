"""Real reports: TAT-QA and FinQA."""
