"""What a model costs: parameters, FLOPs, memory and their balance over pipeline stages."""
