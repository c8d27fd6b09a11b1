"""Files to tokens, once: a folder in the cache that is whole or not there, shared by all who need it."""
