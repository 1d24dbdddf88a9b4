"""Textual inversion: a placeholder token's embeddings, learned with every other weight frozen.

Imports training and the rooms below. `placeholder` serves evaluate and baseline as well, the other modules
the stage invert alone: a change of those learns the embeddings anew and renders no base again.
"""
