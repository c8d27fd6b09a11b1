"""The command line: thin click commands over portmoe."""
