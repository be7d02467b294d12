"""Quality of images: SIFID, LPIPS, and measures that need no trained network.

Images are read as rows, once for each measure, so memory grows with the width and not with the height. The package knows image
files (``engine.io.photo``), stores and networks, and nothing of rendering.
"""
