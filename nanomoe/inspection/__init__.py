"""Inspection of a trained model: which experts its tokens choose, and why."""
