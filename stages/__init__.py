"""The stages, each run as `python -m stages.NAME`, and what they share."""

import gc

# Importing torch and diffusers makes a million objects that stay: looking for cycles among them every
# 700, as is the default, takes a fifth of the time.
gc.set_threshold(10_000, 10, 10)
