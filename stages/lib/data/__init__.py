"""Where pairs come from, one module a format, the image files among them, and the schema of data/pairs.

Imports core and frame. All but two serve prepare alone: every later stage reads `pairs`, and those that
look at images `image_shards`. A new format is a module here that fills a `listing.Listing`, and a line in
`sources.read_folder`.
"""
