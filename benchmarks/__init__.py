"""Scripts that measure, and the figures that they printed."""
