"""The packaged configs."""
