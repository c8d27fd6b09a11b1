"""How ranks share the work: one file per parallelism."""
