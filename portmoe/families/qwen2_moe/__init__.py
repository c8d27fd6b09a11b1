"""Qwen2-MoE and Qwen1.5-MoE (Yang et al. 2024, arXiv:2407.10671): a gated shared expert beside the others."""
