"""Row streaming: a network runs on bands of rows, with the whole image's result and memory for a few rows of it.

``rules`` holds the operations' rules, ``cpu`` the convolutions of a CPU. ``graph`` reads a network's trace and cuts it. ``buffers``
and ``planes`` store rows, ``segment`` runs a part of the network, ``wavefront`` several parts at once, ``stream`` the whole.
"""
