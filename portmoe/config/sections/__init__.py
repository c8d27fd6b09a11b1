"""The sections of a config that every family shares, a file a topic; each is valid by itself."""
