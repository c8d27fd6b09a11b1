"""Small conversations for the tiny chat recipes, made by this project: see ``make``."""
