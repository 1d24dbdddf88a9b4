"""The frozen encoders: what they are fed, how they are run once over everything, and what they left behind.

Imports data, drawing, models, store, core and frame. What computes a row is in the row's key through
`code_identity`; the engine that only schedules may change freely. `latents` and `conditioning` read the
stores and are all that training needs of this room.
"""
