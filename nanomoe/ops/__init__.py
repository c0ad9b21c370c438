"""Array functions that models share."""
