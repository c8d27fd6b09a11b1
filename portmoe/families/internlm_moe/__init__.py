"""InternLM with experts, as the AIChipBenchmark task llm/InternLM/moe trains it."""
