"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434): latent attention, shared experts, groups of experts."""
