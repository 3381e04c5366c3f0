"""What the calibration examples show of each layer."""
