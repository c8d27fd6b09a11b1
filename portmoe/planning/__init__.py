"""What a run would need and do, known before anything is allocated."""
