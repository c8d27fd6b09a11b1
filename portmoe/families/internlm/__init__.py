"""InternLM, dense: the benchmark's framework without experts."""
