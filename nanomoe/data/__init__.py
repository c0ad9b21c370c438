"""Texts, tokenizers, and the batches that are cut from them."""
