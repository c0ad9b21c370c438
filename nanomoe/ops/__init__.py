"""Array functions that all models share."""
