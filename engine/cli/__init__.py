"""What the commands do, one file a group: they bring parts together and print; parts know no terminal."""
