"""Detection over any number of images into Parquet files, part by part, resumable.

The images are listed once (`listing`); every so many of them are a part, which one process
detects (`engine`) and writes whole or not at all (`parts`). `run` knows which parts are there.
Needs the extra `bulk`.
"""
