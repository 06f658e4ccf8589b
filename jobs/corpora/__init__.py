"""Corpora: what is read, from where, row by row, and what of it is a document."""
