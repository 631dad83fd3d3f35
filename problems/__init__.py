"""Bilevel programs, ready to run and to copy."""
