"""Qwen3-MoE (Yang et al. 2025, arXiv:2505.09388): normed queries and keys, heads of any width."""
