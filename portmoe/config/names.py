"""Names the command line needs before it reads a config, which takes long; this file imports nothing."""

PRETRAINED = "model.from_pretrained"  # the key that names a folder of the hub
BENCHMARK = "7b_moe4"  # the packaged config of the benchmark
FROM_FOLDER = "from_pretrained"  # the packaged config without a key, for a model that a folder gives
