"""Names the command line needs before it reads a config. Imports nothing: reading one takes part of a second."""

PRETRAINED = "model.from_pretrained"  # the key that names a folder of the hub
FROM_FOLDER = "from_pretrained"  # the packaged config without a key, for a model that a folder gives
