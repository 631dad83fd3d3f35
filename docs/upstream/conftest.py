"""Tests of what is proposed to other projects: ``python -m pytest docs/upstream``."""

#: Belongs to the patch, and runs with the patched trainer.
collect_ignore = ["trl_row_weights/test_loss_weights.py"]
