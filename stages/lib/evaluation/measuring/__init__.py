"""Pictures and measurements of a UNet and of the data: all of this room that baseline and evaluate use.

Imports diffusion and the rooms below, nothing of evaluation beside it, so that another statistic renders no
picture again. A change renders and measures base and trained UNet anew.
"""
