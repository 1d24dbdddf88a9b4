"""What the stages share, in rooms. A room imports only rooms below it; tests/unit/test_rooms.py holds that.

From the top: page, evaluation, training, diffusion, encoding, drawing, data, models, store, core, frame.
What lies in frame changes no byte of any output: it is in no stage's dependencies. The rest may change bytes.
"""
