"""Where pairs come from, one module a form. Serves `prepare` alone.

Imports core and frame, and of data what lies beside it. A source is a set of files (`files`), be they in a
folder or in tars that are read in place; its names are looked up by `names`, its rows are gathered in a
`listing.Listing`. A new form is a module here that fills one, and a line in `opening.read_files`.
"""
