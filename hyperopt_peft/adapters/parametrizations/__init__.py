"""Adapters with other variables than PEFT's: singular values, scales, selections."""
