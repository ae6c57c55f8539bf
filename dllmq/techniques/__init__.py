"""One technique per file, each a seam with a neutral element: off is a value, not a branch."""
