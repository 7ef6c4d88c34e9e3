"""A model before it runs: where it lies, what family it is of, what memory it takes on which machine."""
