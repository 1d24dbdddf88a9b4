"""Where pairs come from, one module a format, the image files among them, and the schema of data/pairs.

Imports core and frame. All but `pairs` serves prepare alone; `pairs` is read by every later stage. A new
format is a module here that fills a `listing.Listing`, and a line in `sources.read_folder`.
"""
