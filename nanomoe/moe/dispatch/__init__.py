"""Ways in which tokens reach their experts."""
