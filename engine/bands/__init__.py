"""The streaming form of a network: rows in, rows out, with the whole picture's result and memory for its width alone.

``graph`` reads a network's ``torch.fx`` trace, ``buffers`` decides where rows are kept, ``stream`` runs it band by band.
"""
