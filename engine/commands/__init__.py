"""What the commands do, one file a group: they bring parts together and print; the parts know nothing of the
terminal.
"""
