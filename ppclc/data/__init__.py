"""What calibration and training are fed with."""
