"""Images in tar shards of the webdataset format: indexed once, read by range, in any order."""
