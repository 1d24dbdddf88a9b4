"""Labelled tables of pictures, and the fonts of their labels.

Imports core and frame. Serves encode_images, baseline and evaluate, whose drawings change with it; no encoded
row, measurement or weight does.
"""
