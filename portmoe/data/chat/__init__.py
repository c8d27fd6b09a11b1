"""Conversations to tokens, and which of them are learned: records → messages → one rendering → tokens."""
