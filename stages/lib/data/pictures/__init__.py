"""From the bytes of any image file to the pixels that a viewer shows: upright, sRGB, 8 bits, over white.

`storing` checks a file and says how it is kept, for prepare alone. `decoding` is what everyone reads a kept
image with: a change here encodes all images anew. Imports core and frame, and the shards of images beside it.
"""
