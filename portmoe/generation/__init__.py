"""Text that a model goes on with: one token after another, each from a forward pass over what is there."""
