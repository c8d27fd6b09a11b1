"""Tokenizes what it is told in small parts, by two processes: tests end it where they like."""

import sys

import portmoe
from portmoe.data.sources.opened import open_samples
from portmoe.data.text import parts
from portmoe.data.tokenizing import cache

parts.PART = 3000
cache.usable_cores = lambda: 2
open_samples(portmoe.load_config("tiny_moe4", sys.argv[1:]), "train")
