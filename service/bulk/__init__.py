"""Detection over any number of images into Parquet files, part by part, resumable.

The images are listed once (`listing`). A fixed number of them is a part, which one process
detects (`engine`) and writes whole or not at all (`parts`). `run` knows which parts are finished.
Needs the extra `bulk`.
"""
