"""Where the time of a training step goes, part by part, beside what arithmetic and bytes would take."""
