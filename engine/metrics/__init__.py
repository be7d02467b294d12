"""How good pictures are: SIFID, LPIPS, and measures that need no trained network. Every picture is read as rows, once
for each measure, so memory grows with the width and not with the height.

Knows pictures (``engine.io.photo``), stores and networks; knows nothing of rendering: the command renders, this package looks.
"""
