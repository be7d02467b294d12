"""Row streaming: a network runs on bands of rows, with the whole image's result and memory for a few rows of it.

``rules`` holds the operations' rules, ``graph`` reads a network's trace, ``buffers`` stores rows, ``stream`` runs the bands.
"""
