"""Images in memory or in files, and the loader that brings them to the step."""
