"""What a quantized network is: grids, codes, layers, recipes."""
