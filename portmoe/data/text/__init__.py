"""Own text made into a data set: files → documents → tokens → the folder that ``data.train_folder`` reads."""
