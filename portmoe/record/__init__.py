"""What a run leaves behind and shows: run directory, log, console, pages, provenance."""
