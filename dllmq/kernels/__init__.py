"""Low-bit linear layers, one file per backend, each with a float reference it must equal."""
