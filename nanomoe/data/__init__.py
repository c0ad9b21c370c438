"""Texts, tokenizers, and datasets that cut texts into batches."""
