"""Where the implementations in torch's own operators were; they are a backend's now."""

raise ImportError(
    "portmoe.ops.torch_native has become portmoe.backends.torch.ops, with the same names in it: write "
    "`from portmoe.backends.torch import ops as torch_ops` and torch_ops.ALL"
)
