"""The embedded model: a small LLaDA that ships with the package, its tasks and its training."""
