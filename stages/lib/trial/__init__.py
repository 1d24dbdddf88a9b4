"""Trying models by hand: which weights there are, pictures of one prompt from two of them, the page for both.

Imports evaluation and the rooms below. Serves `python -m stages.try_it` alone; no stage depends on it.
"""
