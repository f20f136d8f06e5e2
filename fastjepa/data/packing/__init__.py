"""A folder of images turned into shards: resized once, so that training decodes less and reads in pieces."""
