"""From records on disk to what people read: tables, figures, one HTML page, a copy in W&B.

Nothing here computes a result. `results` defines the record, `compare` the paired differences,
`table`, `figures` and `html` draw them, `build` writes a sweep's files, `tracker` mirrors a run to W&B.
"""
