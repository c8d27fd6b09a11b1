"""Where samples come from, a file a source: each hands on tokens and which of them are to be learned."""
