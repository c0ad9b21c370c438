"""Sweeps: many runs that differ in some config keys."""
