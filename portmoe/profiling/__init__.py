"""Where the time of a step goes, and how fast the device could be."""
