"""The viewer: tiles of stores and pictures over HTTP, and a page that shows them while a render grows.

A source (``source.TileSource``) gives pixels, a pool encodes and keeps them, an ASGI application serves them.
"""
