"""Calibration states drawn from the reverse process, and the statistics the methods ask for."""
